"""Linear layers in bfloat16 on a CPU: what float32 gives, rounded once, in any batch, on any CPU's kernel."""

import platform
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import worker.native
from worker.model.linear_cpu import (
    LinearKernel,
    NativeLinear,
    PackedLinear,
    load_linear_kernel,
    pack_linears,
    packed_numel,
)
from worker.native.build import NativeUnavailable, load_native

_NATIVE = Path(worker.native.__file__).parent
_NO_AMX = ("-DNO_TILES",)
FLAGS = {
    "as the CPU is": (),
    "without AMX": _NO_AMX,
    "without AVX512-BF16": (*_NO_AMX, "-mno-avx512bf16"),
    "without AVX-512": (*_NO_AMX, "-mno-avx512f"),
}


@pytest.fixture(scope="module", params=FLAGS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LinearKernel:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler to build the kernel with")
    if request.param != "as the CPU is" and platform.machine() != "x86_64":
        pytest.skip("the flags are x86's")
    own_sources = [_NATIVE / name for name in ("linear.c", "multiply.c")]  # all of them take four times as long
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("worker.native.build._SOURCES", own_sources)
        return LinearKernel(load_native(FLAGS[request.param]))


def random_linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    for parameter in linear.parameters():
        parameter.data.normal_()
    return linear


def native_linear(linear: nn.Linear, kernel: LinearKernel) -> NativeLinear:
    return NativeLinear(linear, kernel, torch.full((packed_numel(linear),), float("nan"), dtype=torch.bfloat16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (96, 50), (512, 1), (1056, 129)])
def test_it_is_the_float32_result_rounded_once(kernel: LinearKernel, inputs: int, outputs: int, bias: bool) -> None:
    linear = random_linear(inputs, outputs, bias=bias)
    native = native_linear(linear, kernel)
    for rows in (1, 2, 3, 7, 16, 17, 31, 32, 33, 100, 300):
        hidden = torch.randn(1, rows, inputs).bfloat16()
        exact = nn.functional.linear(hidden.double(), linear.weight.double(), linear.bias.double() if bias else None)
        ours = native(hidden)
        assert (ours.shape, ours.dtype) == (exact.shape, torch.bfloat16)
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-3 * inputs**0.5)


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(kernel: LinearKernel) -> None:
    native = native_linear(random_linear(512, 200, bias=True), kernel)
    hidden = torch.randn(290, 512).bfloat16()
    together = native(hidden)
    for first, last in ((0, 1), (3, 5), (10, 26), (20, 52), (250, 290)):
        assert torch.equal(native(hidden[first:last]), together[first:last])
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(native(hidden), together)
    finally:
        torch.set_num_threads(threads)


def test_what_a_row_holds_stays_in_it(kernel: LinearKernel) -> None:
    """Rows beside a broken one are whole, and neither NaN nor infinity is lost."""
    native = native_linear(random_linear(64, 40, bias=False), kernel)
    hidden = torch.randn(20, 64).bfloat16()
    wanted = native(hidden)
    hidden[4, 7], hidden[18, 63] = float("nan"), float("inf")
    broken = native(hidden)
    assert broken[4].isnan().all()
    assert not broken[18].isfinite().any()
    others = [row for row in range(20) if row not in (4, 18)]
    assert torch.equal(broken[others], wanted[others])


def test_layers_that_the_kernel_cannot_serve_are_left_to_others() -> None:
    model = nn.Sequential(
        nn.Linear(64, 8, dtype=torch.bfloat16), nn.Linear(40, 8, dtype=torch.bfloat16), nn.Linear(64, 8)
    )
    wanted = [child(torch.ones(2, child.in_features, dtype=child.weight.dtype)) for child in model]
    pack_linears(model)
    assert type(model[0]) is (NativeLinear if load_linear_kernel() is not None else PackedLinear)
    assert type(model[1]) in (PackedLinear, nn.Linear)
    assert type(model[2]) is nn.Linear
    for child, one in zip(model, wanted, strict=True):
        ours = child(torch.ones(2, child.in_features, dtype=one.dtype))
        torch.testing.assert_close(ours, one, rtol=1e-2, atol=1e-2)


def test_without_a_compiler_there_is_no_kernel(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert load_linear_kernel() is None
    with pytest.raises(NativeUnavailable, match="compiler"):
        load_native()
