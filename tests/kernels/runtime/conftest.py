import pytest

from surgeon_kernels.runtime import toolchain


@pytest.fixture
def toolkit(monkeypatch):
    """The architectures that nvcc 13.0 lists."""
    numbers = ["7.5", "8.0", "8.6", "8.7", "8.8", "8.9", "9.0", "10.0", "11.0", "10.3", "12.0", "12.1"]
    monkeypatch.setattr(toolchain, "_toolkit", lambda: {tuple(map(int, number.split("."))) for number in numbers})
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return monkeypatch
