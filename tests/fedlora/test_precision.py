"""The devices and number formats that "auto" selects."""

import pytest

from fedlora.training import precision, resolve_precision


@pytest.mark.parametrize(("flags", "expected"), [
    ({"avx2", "avx512f"}, "fp32"), ({"avx512f", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), (set(), "fp32")])
def test_auto_takes_bf16_on_processors_that_multiply_it(monkeypatch, flags, expected):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("fp32", "cpu") == "fp32" and resolve_precision("bf16", "cpu") == "bf16"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_on_gpus_that_have_it(monkeypatch, native, expected):
    asked = []
    monkeypatch.setattr("torch.cuda.is_bf16_supported",
                        lambda including_emulation=True: asked.append(including_emulation) or native)
    assert resolve_precision("auto", "cuda") == expected and asked == [False]


def test_what_is_no_precision_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"fp16.*auto, fp32, bf16"):
        resolve_precision("fp16", "cpu")
