"""The simulated MPS device: memory, operators, errors, and what of PyTorch works on it."""

from __future__ import annotations

import copy
import io
import sys
import threading

import pytest
import simulator
import torch
import torch.nn.functional as F
from torch import nn

if sys.platform != "linux":
    pytest.skip("the simulated device is for Linux", allow_module_level=True)

simulator.enable()

MPS = torch.device("mps")


# ------------------------------------------------------------------------------------- the device


def test_device_is_there():
    assert torch.backends.mps.is_available() and torch.backends.mps.is_built()
    assert torch.mps.is_available() and torch.mps.device_count() == 1
    assert torch.accelerator.current_accelerator() == torch.device("mps")
    assert torch.ones(2, device="mps").device == torch.device("mps:0")
    assert "Simulated" in torch.backends.mps.get_name()


def test_enable_again_changes_nothing():
    simulator.enable()
    assert simulator.enabled()
    assert torch.ones(2, device=MPS).sum().item() == 2


def test_handles_are_not_addresses():
    # Non-canonical on x86-64: bit 62 is set and bit 63 is not.
    assert torch.ones(2, device=MPS).data_ptr() >> 62 == 1
    base = torch.arange(10, device=MPS)
    assert base[3:].data_ptr() == base.data_ptr() + 3 * base.element_size()
    assert base.untyped_storage().data_ptr() == base.data_ptr()
    with pytest.raises(TypeError, match="can't convert mps"):
        base.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_new_memory_is_nan(dtype):
    assert torch.empty(1000, dtype=dtype, device=MPS).isnan().all()
    assert torch.empty_strided((3, 4), (8, 2), dtype=dtype, device=MPS).isnan().all()
    assert torch.empty(0, dtype=dtype, device=MPS).resize_(5).isnan().all()


def test_memory_is_counted():
    keep = torch.empty(1, device=MPS)
    simulator.reset_peak()
    before = simulator.memory()
    assert before.peak == before.allocated
    a = torch.empty(1000, device=MPS)
    b = a + 1  # the CPU kernel's result is adopted, and counted
    assert simulator.memory().allocated == before.allocated + 8000
    assert simulator.memory().allocations == before.allocations + 2
    del a, b
    after = simulator.memory()
    assert after.allocated == before.allocated
    assert after.peak == before.allocated + 8000
    assert torch.mps.current_allocated_memory() == after.allocated
    del keep


def test_synchronize_events_and_cache():
    torch.mps.synchronize()
    torch.mps.empty_cache()
    torch.accelerator.synchronize()
    start, end = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) == 0.0


# -------------------------------------------------------------------------------- CPU aliases


def test_views_share_storage():
    base = torch.zeros(4, 3, device=MPS)
    view = base.t()[1]
    view.fill_(7)
    assert base[:, 1].eq(7).all() and base.sum().item() == 28
    chunks = base.chunk(2)
    assert chunks[1].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    # An operator that the device runs on the CPU and that returns a view of its argument.
    assert base.diagonal().untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def test_in_place_returns_the_same_tensor():
    x = torch.ones(3, device=MPS)
    address = x.data_ptr()
    assert x.add_(1) is x
    assert x.data_ptr() == address and x.eq(2).all()
    x[1] = 5
    x[x > 4] = -1
    assert x.tolist() == [2, -1, 2]


def test_out_is_written_and_resized():
    x = torch.ones(3, device=MPS)
    out = torch.empty(0, device=MPS)
    result = torch.add(x, 1, out=out)
    assert result is out and out.shape == (3,) and out.tolist() == [2, 2, 2]
    ready = torch.zeros(3, device=MPS)
    address = ready.data_ptr()
    torch.mul(x, 3, out=ready)
    assert ready.data_ptr() == address and ready.tolist() == [3, 3, 3]


def test_lists_and_optional_lists_of_tensors():
    x = torch.arange(6.0, device=MPS)
    assert torch.cat([x, x]).shape == (12,)
    assert torch.stack([x, x]).device.type == "mps"
    total = torch._foreach_add([x, x], 1)
    assert all(t.device.type == "mps" for t in total) and total[1][5].item() == 6
    rows = x.view(2, 3)[torch.tensor([1, 0], device=MPS)]
    assert rows.tolist() == [[3, 4, 5], [0, 1, 2]]


def test_overlap_is_still_noticed():
    x = torch.arange(4.0, device=MPS)
    with pytest.raises(RuntimeError, match="unsupported operation"):
        x[1:].add_(x[:-1])


def test_set_and_resize():
    x = torch.arange(6.0, device=MPS)
    y = torch.empty(0, device=MPS).set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    assert y.tolist() == [[2, 3], [4, 5]]
    x.resize_(8)
    assert x[:6].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="different device"):
        x.set_(torch.ones(3).untyped_storage())


def test_conjugate_and_negative_views():
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    m = z.to(MPS)
    assert m.conj().is_conj()
    torch.testing.assert_close((m.conj() * m).cpu(), z.conj() * z)
    torch.testing.assert_close(m.conj().imag.cpu(), z.conj().imag)


def test_copies_between_devices():
    x = torch.arange(12.0).view(3, 4)
    m = x.to("mps")
    torch.testing.assert_close(m.t().cpu(), x.t())
    m.copy_(x.double() + 1)  # a float64 source is converted
    torch.testing.assert_close(m.cpu(), x + 1)
    assert m.half().cpu().dtype == torch.float16
    assert copy.deepcopy(m).device.type == "mps"


def test_random_numbers_follow_the_seed():
    torch.mps.manual_seed(3)
    first = torch.randn(5, device=MPS)
    state = torch.mps.get_rng_state()
    second = torch.randn(5, device=MPS)
    torch.mps.set_rng_state(state)
    assert torch.equal(torch.randn(5, device=MPS), second)
    torch.manual_seed(3)  # seeds every device
    assert torch.equal(torch.randn(5, device=MPS), first)
    own = torch.Generator(device="mps").manual_seed(3)
    assert torch.equal(torch.randn(5, device=MPS, generator=own), first)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(5, device=MPS, generator=torch.Generator())


def test_save_and_load():
    file = io.BytesIO()
    torch.save({"x": torch.arange(3.0, device=MPS)}, file)
    file.seek(0)
    loaded = torch.load(file)["x"]
    assert loaded.device.type == "mps" and loaded.tolist() == [0, 1, 2]
    file.seek(0)
    assert torch.load(file, map_location="cpu")["x"].device.type == "cpu"


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, dtype=torch.float64, device=MPS),
        lambda: torch.ones(2, device=MPS).double(),
        lambda: torch.ones(2).double().to(MPS),
        lambda: torch.empty_strided((2,), (1,), dtype=torch.float64, device=MPS),
        lambda: torch.ones(2, dtype=torch.complex128, device=MPS),
    ],
)
def test_float64_is_refused(make):
    with pytest.raises(TypeError, match="MPS"):
        make()


def test_devices_do_not_mix():
    x = torch.ones(2, device=MPS)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, 2) @ torch.ones(2, 2, device=MPS)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3]  # a 0-dim CPU tensor is a number
    assert x[torch.tensor([0])].tolist() == [1]  # indices may come from the CPU


def test_foreign_operator_without_mps_kernel():
    library = torch.library.Library("simulator_test", "FRAGMENT")
    library.define("only_cpu(Tensor x) -> Tensor")
    library.impl("only_cpu", lambda x: x + 1, "CPU")
    assert torch.ops.simulator_test.only_cpu(torch.ones(1)).item() == 2
    with pytest.raises(NotImplementedError, match=r"simulator_test::only_cpu.*MPS"):
        torch.ops.simulator_test.only_cpu(torch.ones(1, device=MPS))


def test_strict_mode():
    matrix = torch.eye(2, device=MPS)
    torch.linalg.eigvals(matrix)  # there is no MPS kernel, but a CPU kernel to borrow
    assert simulator.strict() > 800
    try:
        with pytest.raises(NotImplementedError, match=r"linalg_eig.*strict"):
            torch.linalg.eigvals(matrix)
        assert (matrix @ matrix + 1).softmax(-1).device.type == "mps"
    finally:
        simulator.strict(False)
    torch.linalg.eigvals(matrix)


def test_fallback_ops_are_counted():
    before = simulator.fallback_ops().get("aten::cumsum.out", 0)
    torch.ones(3, device=MPS).cumsum(0)
    assert simulator.fallback_ops()["aten::cumsum.out"] == before + 1


# ----------------------------------------------------------------------- PyTorch on the device


def test_autograd():
    x = torch.randn(3, 4, device=MPS, requires_grad=True)
    w = torch.randn(4, 2, device=MPS, requires_grad=True)
    (x @ w).tanh().pow(2).sum().backward()
    cx, cw = (t.detach().cpu().requires_grad_() for t in (x, w))
    (cx @ cw).tanh().pow(2).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), cx.grad)
    torch.testing.assert_close(w.grad.cpu(), cw.grad)


def test_convolution():
    torch.manual_seed(0)
    for layer in (nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(2, 4, 3, stride=2)):
        x = torch.randn(1, 2, 6, 6)
        want = layer(x)
        want.sum().backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        moved = copy.deepcopy(layer).to(MPS)
        got = moved(x.to(MPS))
        got.sum().backward()
        torch.testing.assert_close(got.cpu(), want)
        for parameter, grad in zip(moved.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad.cpu(), grad)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("grad", [False, True])
def test_scaled_dot_product_attention(mask, grad):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    bias = {"bool": torch.ones(5, 5).tril().bool(), "float": torch.randn(5, 5)}.get(mask)
    want = F.scaled_dot_product_attention(q, k, v, bias, is_causal=mask is None)
    mq, mk, mv = (t.to(MPS).requires_grad_(grad) for t in (q, k, v))
    bias = None if bias is None else bias.to(MPS)
    got = F.scaled_dot_product_attention(mq, mk, mv, bias, is_causal=mask is None)
    torch.testing.assert_close(got.detach().cpu(), want)
    if grad:
        got.sum().backward()
        assert mq.grad.isfinite().all()


def test_attention_dropout_needs_gradients():
    q = torch.randn(1, 1, 4, 8, device=MPS)
    with pytest.raises(NotImplementedError, match="dropout"):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    q.requires_grad_()
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    x = torch.randn(4, 4, device=MPS)
    with torch.autocast("mps", dtype=dtype):
        assert (x @ x).dtype == dtype
        assert nn.Linear(4, 4).to(MPS)(x).dtype == dtype
        assert F.layer_norm(x @ x, (4,)).dtype == torch.float32
        assert F.scaled_dot_product_attention(x[None], x[None], x[None]).dtype == dtype


def test_grad_scaler():
    scaler = torch.amp.GradScaler("mps")
    weight = nn.Parameter(torch.ones(3, device=MPS))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler.scale((weight * 2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach().cpu(), torch.full((3,), 0.8))
    optimizer.zero_grad()
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)  # skipped
    scaler.update()
    torch.testing.assert_close(weight.detach().cpu(), torch.full((3,), 0.8))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    x = torch.randn(8, device=MPS, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda t: t.sin().exp(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    (want,) = torch.autograd.grad(x.sin().exp().sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_transforms():
    x = torch.randn(4, 3, device=MPS)
    assert torch.vmap(torch.dot)(x, x).shape == (4,)
    torch.testing.assert_close(torch.func.grad(lambda t: (t**2).sum())(x), 2 * x)
    _, tangent = torch.func.jvp(lambda t: t * 3, (x,), (torch.ones_like(x),))
    assert tangent.eq(3).all()


def test_python_operator():
    @torch.library.custom_op("simulator_test::triple", mutates_args=(), device_types="mps")
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    triple.register_fake(torch.empty_like)
    triple.register_autograd(lambda ctx, grad: grad * 3)
    x = torch.ones(2, device=MPS, requires_grad=True)
    triple(x).sum().backward()
    assert x.grad.tolist() == [3, 3]
    with pytest.raises(NotImplementedError):
        triple(torch.ones(2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    def function(x, w):
        return F.gelu(x @ w).softmax(-1)

    x, w = torch.randn(4, 5, device=MPS), torch.randn(5, 3, device=MPS, requires_grad=True)
    want = function(x, w)
    (want_grad,) = torch.autograd.grad(want[:, 0].sum(), w)
    got = torch.compile(function, backend=backend, fullgraph=True)(x, w)
    (got_grad,) = torch.autograd.grad(got[:, 0].sum(), w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)


def test_two_threads():
    failures = []

    def work(seed):
        try:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(16, 16, generator=generator)
            w = x.to(MPS).requires_grad_()
            for _ in range(50):
                (grad,) = torch.autograd.grad((w @ w).tanh().sum(), w)
            cpu = x.clone().requires_grad_()
            (want,) = torch.autograd.grad((cpu @ cpu).tanh().sum(), cpu)
            torch.testing.assert_close(grad.cpu(), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
