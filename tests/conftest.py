"""Environment of the test suite: offline, seeded, one thread a worker, caches of its own."""

import atexit
import os
import shutil
import tempfile

# Set before torch, transformers and matplotlib are imported, here or in a subprocess of a test. A cache of its own for
# each worker: two of them copying remote code into one folder would race, and the user's own cache stays as it is.
_CACHE = tempfile.mkdtemp(prefix="moleblend-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=_CACHE,
)

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import set_seed  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it in its worker."""
    set_seed(0)


@pytest.fixture
def on_cpu(monkeypatch):
    """Runs of one process on the CPU, which Accelerate's process-wide state does not carry from test to test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
