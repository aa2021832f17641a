import pytest

from mptqc.runtime.machine import core_count, cpu_features, cpu_info, processor_name, saturates_in_16_bits

TEXT = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nmodel name\t: Other\n"


def test_first_processor_is_read():
    info = cpu_info(TEXT.format("avx512f"))
    assert processor_name(info) == "Some CPU @ 2 GHz"
    features = cpu_features(info)
    assert features is not None
    assert features["avx2"]
    assert features["avx512f"]
    assert not features["avx512_vnni"]


def test_unknown_system_has_unknown_features():
    assert cpu_features(cpu_info("")) is None
    assert processor_name(cpu_info(""))


@pytest.mark.parametrize(
    ("flags", "saturates"), [("", True), ("avx512f", True), ("avx_vnni", False), ("avx512_vnni", False)]
)
def test_avx2_without_vnni_saturates(flags: str, saturates: bool):
    features = cpu_features(cpu_info(TEXT.format(flags)))
    assert features is not None
    assert saturates_in_16_bits(features) is saturates


def test_no_avx2_does_not_saturate():
    features = cpu_features({"flags": "fpu sse2"})
    assert features is not None
    assert not saturates_in_16_bits(features)


def test_core_count_is_positive():
    assert core_count() >= 1


def test_arm_has_its_own_features():
    features = cpu_features(cpu_info("processor\t: 0\nFeatures\t: fp asimd asimddp\n"))
    assert features == {"asimddp": True, "i8mm": False}
    assert not saturates_in_16_bits(features)
