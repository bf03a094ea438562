"""What Metal's compiler refuses is a CompileError with file:line; legal twins compile."""

import pytest
from simulator import engine

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
TID = "uint t [[thread_position_in_grid]]"
OUT = "device float* o [[buffer(0)]]"

# name: (source behind HEAD, pattern of the message); the fault is on line 3
REFUSED = {
    "device to threadgroup pointer": (
        f"kernel void k({OUT}, {TID}) {{ threadgroup float* p = o; p[0] = 1; }}",
        "cannot initialize",
    ),
    "threadgroup to thread pointer": (
        f"kernel void k({OUT}) {{ threadgroup float s[4]; thread float* p = s; o[0] = p[0]; }}",
        "cannot initialize",
    ),
    "device lvalue as thread reference": (
        f"void f(thread float& x) {{ x = 1; }} kernel void k({OUT}, {TID}) {{ f(o[t]); }}",
        "no matching function",
    ),
    "write through constant": (
        f"kernel void k(constant float* c [[buffer(0)]], {TID}) {{ c[t] = 1; }}",
        "const",
    ),
    "write to a program-scope constant": (
        f"constant float table[2] = {{1, 2}}; kernel void k({OUT}, {TID}) {{ table[t] = o[t]; }}",
        "const",
    ),
    "dropped const": (
        "kernel void k(const device float* c [[buffer(0)]]) { device float* p = c; p[0] = 1; }",
        "cannot initialize",
    ),
    "parameter without attribute": (
        f"kernel void k({OUT}, uint t) {{ o[t] = 1; }}",
        "parameter 'uint t' has no attribute",
    ),
    "unknown attribute": (
        f"kernel void k({OUT}, uint t [[thread_position_in_space]]) {{ o[t] = 1; }}",
        "thread_position_in_space",
    ),
    "buffer 31": (
        f"kernel void k(device float* o [[buffer(31)]], {TID}) {{ o[t] = 1; }}",
        "Metal has 31 buffers",
    ),
    "member named fragment": (
        f"struct S {{ float fragment(int i) const {{ return 1.0f; }} }};"
        f"kernel void k({OUT}, {TID}) {{ S s; o[t] = s.fragment(0); }}",
        "a keyword of Metal",
    ),
    "variable named vertex": (
        f"kernel void k({OUT}, {TID}) {{ float vertex = 1.0f; o[t] = vertex; }}",
        "a keyword of Metal",
    ),
    "double": (
        f"kernel void k(device double* o [[buffer(0)]], {TID}) {{ o[t] = 1; }}",
        "no double",
    ),
    "long double literal": (f"kernel void k({OUT}, {TID}) {{ o[t] = 1.0L; }}", "no long double"),
    "pointer without address space": (
        "void f(float* x) { x[0] = 1; } "
        f"kernel void k({OUT}, {TID}) {{ float z[1]; f(z); o[t] = z[0]; }}",
        "pointer 'x' has no address space",
    ),
    "reference without address space": (
        f"void f(uint& x) {{ x = 1; }} kernel void k({OUT}, {TID}) {{ f(t); }}",
        "reference 'x' has no address space",
    ),
    "struct pointer without address space": (
        f"struct S {{ int a; }}; int f(const S* s) {{ return s->a; }} kernel void k({OUT}) {{}}",
        "pointer 's' has no address space",
    ),
    "new": (f"kernel void k({OUT}) {{ thread int* p = new int(3); o[0] = *p; }}", "no new"),
    "virtual": (f"struct S {{ virtual void f(); }}; kernel void k({OUT}) {{}}", "no virtual"),
    "exceptions": (f"kernel void k({OUT}) {{ throw 1; }}", "no exceptions"),
    "goto": (f"kernel void k({OUT}) {{ x: o[0] = 1; goto x; }}", "no goto"),
    "implicit vector conversion": (
        "kernel void k(device float2* o [[buffer(0)]]) { half2 h = half2(1, 2); o[0] = h; }",
        "half2|_Float16",
    ),
    "wrong number of components": (
        "kernel void k(device float4* o [[buffer(0)]]) { o[0] = float4(1, 2, 3); }",
        "wrong number of components",
    ),
    "syntax": (f"kernel void k({OUT}) {{ o[0] = ; }}", "expected expression"),
    "unmatched bracket": (f"kernel void k({OUT}) {{ o[0 = 1; }}", "unmatched"),
    "missing header": ("#include <c10/metal/utils.h>", "file not found"),
    "standard library": (f"kernel void k({OUT}) {{ o[0] = std::exp(1.0f); }}", "std"),
    "duplicate name": (
        f'kernel void k({OUT}) {{}} [[host_name("k")]] kernel void j({OUT}) {{}}',
        "two",
    ),
    "concepts": (
        "template <typename T> concept C = true; template <C T> T f(T x) { return x; } "
        f"kernel void k({OUT}) {{ o[0] = f(1.0f); }}",
        "C\\+\\+17 at most",
    ),
}

ACCEPTED = {
    "plain": f"kernel void k({OUT}, {TID}) {{ o[t] = 1; }}",
    "deleted function": f"struct S {{ S() = delete; }}; kernel void k({OUT}) {{}}",
    "aggregate": f"struct S {{ int a; }}; kernel void k({OUT}) {{ S s = {{1}}; o[0] = s.a; }}",
    "constexpr if": (
        "template <bool B> float f() { if constexpr (B) return 1; else return 2; } "
        f"kernel void k({OUT}) {{ o[0] = f<true>(); }}"
    ),
    "unnumbered buffers": "kernel void k(device float* a, constant float& b) { a[0] = b; }",
    "method for device objects": (
        "struct S { float a; float get() const device { return a; } }; "
        f"kernel void k({OUT}) {{ o[0] = 1; }}"
    ),
    "kernel in a namespace": (
        "namespace n { template <typename T> kernel void k(device T* o) { o[0] = 1; } } "
        'template [[host_name("k")]] [[kernel]] decltype(n::k<float>) n::k<float>;'
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    source, message = REFUSED[name]
    with pytest.raises(engine.CompileError, match=f"(?s)program_source:3.*({message})"):
        engine.compile(HEAD + source)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    library = engine.compile(HEAD + ACCEPTED[name])
    assert library.names == ["k"]


def test_source_must_be_ascii():
    with pytest.raises(engine.CompileError, match="program_source:2: error: character"):
        engine.compile("kernel void k(device float* o) {}\n// \u00e9")


def test_newer_language_is_a_warning():
    fold = "template <class... T> float f(T... x) { return (x + ...); } "
    library = engine.compile(HEAD + fold + f"kernel void k({OUT}) {{ o[0] = f(1.0, 2.0); }}")
    assert "before C++17" in library.warnings[0]
    assert engine.compile(HEAD + ACCEPTED["plain"]).warnings == []


def test_line_numbers_follow_line_directives_and_includes(tmp_path):
    (tmp_path / "body.h").write_text("\n\nkernel void k(device float* o) { o[0] = oops; }\n")
    with pytest.raises(engine.CompileError, match=r"body\.h:3:.*oops"):
        engine.compile('#include "body.h"\n', include_dirs=[tmp_path])
    with pytest.raises(engine.CompileError, match=r"template\.metal:41:.*oops"):
        engine.compile(
            '#line 40 "template.metal"\n\nkernel void k(device float* o) { o[0] = oops; }'
        )
