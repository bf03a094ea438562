"""Families that choose a class of attention by name: on Metal, or as they are with a warning."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from weights import stir

import orchard_ops
from orchard_ops.integrations import class_tables
from orchard_ops.integrations import transformers as door

DEVICE = "mps"
MODELS = Path(transformers.__file__).parent / "models"


def tables() -> dict[str, list[str]]:
    """Every table of attention classes in the sources of this transformers, with its names."""
    found = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text()).body if '"eager": ' in file.read_text() else ():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                names = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                if "eager" in names:
                    found[file.stem.removeprefix("modeling_")] = names
    return found


TABLES = tables()

_TEXT = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
_SAM = dict(
    hidden_size=32,
    output_channels=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    window_size=3,
    global_attn_indexes=(1,),
    mlp_dim=32,
)
_DROPOUTS = dict(attention_dropout=0.0, hidden_dropout=0.0)


def _ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def _padded() -> dict[str, Tensor]:
    mask = torch.ones((2, 24), dtype=torch.int64)
    mask[0, 17:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _pixels(size: int, channels: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn((2, channels, size, size), generator=generator)}


def _of(file: str, config: str, model: str, **options: Any) -> Any:
    def make(implementation: str) -> nn.Module:
        kinds = importlib.import_module(f"transformers.models.{_folder(file)}.modeling_{file}")
        configs = importlib.import_module(
            f"transformers.models.{_folder(file)}.configuration_{file}"
        )
        torch.manual_seed(0)
        of_kind = getattr(configs, config)(**options)
        return stir(getattr(kinds, model)._from_config(of_kind, attn_implementation=implementation))

    return make


def _folder(file: str) -> str:
    return next(path.parent.name for path in MODELS.glob(f"*/modeling_{file}.py"))


_FALCON = dict(_TEXT, **_DROPOUTS, ffn_hidden_size=64)
_BARK = dict(num_layers=2, num_heads=4, hidden_size=64, block_size=64, dropout=0.0)
_SUPERGLUE = dict(
    keypoint_detector_config=dict(
        model_type="superpoint",
        encoder_hidden_sizes=[8, 8, 8, 8],
        decoder_hidden_size=8,
        keypoint_decoder_dim=65,
        descriptor_decoder_dim=16,
        keypoint_threshold=0.0,
        max_keypoints=12,
        border_removal_distance=2,
    ),
    hidden_size=16,
    keypoint_encoder_sizes=[8, 8],
    gnn_layers_types=["self", "cross"],
    num_attention_heads=2,
    sinkhorn_iterations=5,
)
_GIT = dict(
    _TEXT,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    vision_config=dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    ),
)
_NEO = dict(
    vocab_size=64,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    window_size=8,
    max_position_embeddings=64,
)
_DATA2VEC = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=16,
    patch_size=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    drop_path_rate=0.0,
    use_relative_position_bias=True,
)
_OCR = ("SamVisionConfig", "SamVisionEncoder")
CASES: dict[str, tuple[str, Any, dict[str, Tensor]]] = {
    "falcon": ("falcon", _of("falcon", "FalconConfig", "FalconForCausalLM", **_FALCON), _padded()),
    "falcon with alibi": (
        "falcon",
        _of("falcon", "FalconConfig", "FalconForCausalLM", **_FALCON, alibi=True),
        _padded(),
    ),
    "falcon of 2023": (
        "falcon",
        _of(
            "falcon",
            "FalconConfig",
            "FalconForCausalLM",
            **_FALCON,
            new_decoder_architecture=True,
            num_kv_heads=2,
        ),
        {"input_ids": _ids()},
    ),
    "sam": ("sam", _of("sam", "SamVisionConfig", "SamVisionModel", **_SAM), _pixels(32)),
    "sam_hq": (
        "sam_hq",
        _of("sam_hq", "SamHQVisionConfig", "SamHQVisionModel", **_SAM),
        _pixels(32),
    ),
    "deepseek_ocr2": (
        "deepseek_ocr2",
        _of(
            "deepseek_ocr2",
            *("DeepseekOcr2" + name for name in _OCR),
            **_SAM,
            downsample_channels=[8, 8],
        ),
        _pixels(32),
    ),
    "unlimited_ocr": (
        "unlimited_ocr",
        _of(
            "unlimited_ocr",
            *("UnlimitedOcr" + name for name in _OCR),
            **_SAM,
            downsample_channels=[8, 8],
        ),
        _pixels(32),
    ),
    "data2vec_vision": (
        "data2vec_vision",
        _of("data2vec_vision", "Data2VecVisionConfig", "Data2VecVisionModel", **_DATA2VEC),
        _pixels(16),
    ),
    "gpt_neo": ("gpt_neo", _of("gpt_neo", "GPTNeoConfig", "GPTNeoForCausalLM", **_NEO), _padded()),
    "bark": (
        "bark",
        _of(
            "bark",
            "BarkSemanticConfig",
            "BarkSemanticModel",
            **_BARK,
            input_vocab_size=64,
            output_vocab_size=64,
        ),
        _padded(),
    ),
    "git": ("git", _of("git", "GitConfig", "GitModel", **_GIT), _padded() | _pixels(16)),
    "superglue": (
        "superglue",
        _of("superglue", "SuperGlueConfig", "SuperGlueForKeypointMatching", **_SUPERGLUE),
        {"pixel_values": _pixels(32, 2 * 3)["pixel_values"].view(2, 2, 3, 32, 32)},
    ),
}


def step(model: nn.Module, inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """What a training step gives, without rows of padding."""
    model.to(device).train()
    result = model(**{name: x.to(device) for name, x in inputs.items()})
    names = ("logits", "last_hidden_state", "matching_scores")
    out = next(result[name] for name in names if name in result)
    if "attention_mask" in inputs and out.dim() == 3:
        kept = inputs["attention_mask"].to(device)[..., None]
        out = out[:, -kept.shape[1] :] * kept
    if out.requires_grad:
        (out * torch.sin(torch.arange(out.numel(), device=device).view_as(out))).sum().backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach().cpu(), **grads}


def test_every_table_of_this_transformers_has_a_case():
    assert len(TABLES) >= 5
    assert {file for file, _, _ in CASES.values()} == TABLES.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_family_with_a_table_trains_as_with_eager_attention(case: str):
    file, make, inputs = CASES[case]
    # Falcon's eager attention adds its ALiBi twice: the mask holds it already.
    expected = step(make("sdpa" if case == "falcon with alibi" else "eager"), inputs, "cpu")
    orchard_ops.reset_stats()
    found = step(make("orchard"), inputs, DEVICE)
    assert found.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        bound = 2e-5 * x.abs().max().item() + 2e-6 * (0.0 if name == "out" else largest)
        assert (found[name] - x).abs().max() <= bound, name
    stats = orchard_ops.stats()
    assert not stats.reference and not stats.left_to_pytorch
    assert bool(sum(stats.metal.values())) == ("sdpa" in TABLES[file] or file == "git")


@pytest.mark.parametrize("case", [case for case in CASES if "sdpa" not in TABLES[CASES[case][0]]])
def test_attention_that_only_the_family_has_is_said_by_name(
    case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    _, make, _ = CASES[case]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    class_tables._logger.warning_once.cache_clear()
    model = type(make("orchard")).__name__
    assert f'attn_implementation="orchard": {model} has attention of its own only' in caplog.text


def test_falcon_makes_no_mask_of_all_queries_and_keys():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            results = func(*args, **(kwargs or {}))
            for x in results if isinstance(results, tuple | list) else (results,):
                assert not isinstance(x, Tensor) or tuple(x.shape[-2:]) != (24, 24), func
            return results

    _, make, inputs = CASES["falcon"]
    model = make("orchard").to(DEVICE)
    with Look():
        model(**{k: v.to(DEVICE) for k, v in inputs.items()}).logits.sum().backward()


@pytest.mark.parametrize("case", ("falcon", "sam"))
def test_checkpointed_compiled_and_copied(case: str):
    _, make, inputs = CASES[case]
    expected = step(make("eager"), inputs, "cpu")
    model = make("orchard")
    model.gradient_checkpointing_enable()
    checkpointed = step(copy.deepcopy(model), inputs, DEVICE)
    model = make("orchard")
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    orchard_ops.reset_stats()
    compiled = step(model, inputs, DEVICE)
    assert sum(orchard_ops.stats().metal.values())
    for found in (checkpointed, compiled):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ("falcon", "sam", "data2vec_vision"))
def test_a_whole_model_is_saved_and_loaded(case: str, monkeypatch: pytest.MonkeyPatch):
    """Also where the class of its attention has not been made yet, as in another process."""
    _, make, inputs = CASES[case]
    model = make("orchard")
    expected = step(model, inputs, DEVICE)
    file = io.BytesIO()
    torch.save(model.cpu(), file)
    kinds = {type(module) for module in model.modules()}
    for is_new in (False, True):
        if is_new:
            afresh = functools.cache(class_tables._answering.__wrapped__)
            monkeypatch.setattr(class_tables, "_answering", afresh)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert ({type(module) for module in loaded.modules()} == kinds) != is_new
        loaded.zero_grad()
        orchard_ops.reset_stats()
        found = step(loaded, inputs, DEVICE)
        assert sum(orchard_ops.stats().metal.values())
        assert found.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("p", (0.0, 0.5))
def test_dropout_is_what_the_module_passes(p: float, training: bool):
    """As F.scaled_dot_product_attention, which does not ask in which mode a module is."""
    module = nn.Module().train(training)
    q = torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(0))
    mask = door.attention_mask(1, 24, 24)
    outs = []
    for given in (mask, mask.visibility.to_float().clone()):
        torch.manual_seed(3)
        outs.append(door.sdpa_forward(module, q, q.cos(), q.sin(), given, dropout_p=p))
    torch.testing.assert_close(*outs)
    plain = door.sdpa_forward(module, q, q.cos(), q.sin(), mask)
    assert torch.equal(outs[0], plain) == (p == 0.0)


def test_falcon_generates_as_with_eager_attention():
    _, make, _ = CASES["falcon"]
    for cache in ("dynamic", "static"):
        tokens = []
        for implementation, device in (("eager", "cpu"), ("orchard", DEVICE)):
            model = make(implementation).to(device).eval()
            model.generation_config.eos_token_id = None
            mask = torch.ones((2, 24), dtype=torch.int64)
            mask[0, :5] = 0
            options = {} if cache == "dynamic" else {"cache_implementation": cache}
            arguments = {"attention_mask": mask.to(device), "pad_token_id": 0, **options}
            made = model.generate(_ids().to(device), max_new_tokens=6, do_sample=False, **arguments)
            tokens.append(made.cpu())
        assert torch.equal(*tokens)


def test_a_model_that_was_made_before_keeps_its_classes_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    class_tables._logger.warning_once.cache_clear()
    model = CASES["sam"][1]("sdpa")
    model.set_attn_implementation("orchard")
    assert "SamVisionSdpaAttention of SamVisionModel were chosen when the model" in caplog.text


def test_registering_again_changes_nothing():
    before = transformers.PreTrainedModel.get_correct_attn_implementation
    door.register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before


def test_a_transformers_without_the_hook_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.delattr(transformers.PreTrainedModel, "get_correct_attn_implementation")
    door.register()
    assert "families that choose a class by the name (Falcon, SAM)" in caplog.text
