"""What every test runs under: CPU, eight virtual devices, exact float32 matmuls, no hub."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read when jax, XLA and huggingface_hub are imported, so set first. Subprocesses inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

if TYPE_CHECKING:
    from softprompt.models.decoder import Decoder
    from softprompt.pretrained.loading import Loaded

# Config rather than environment: a subprocess (the command line, a second process of a cluster)
# starts with one device as a user's would.
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disallow_mesh_context_manager", True)

# The cache of compiled programs is emptied when it is larger.
MOST_KEPT_BYTES = 2**31

# A process may map so many pieces of memory (Linux: 65,530), and a compiled program takes several.
MOST_MAPS = 20_000

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept in pytest's cache folder, for all workers and for the next run.

    Many tests compile one program again: in a session of its own, or in another module. Small ones
    are compiled sooner than they are read. `--cache-clear` and `make clean` remove the folder.
    """
    # A shell's background ignores SIGINT, and nohup SIGHUP; so would the processes that tests start
    # and send these to. A handler is not inherited.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if not hasattr(config, "cache"):  # with -p no:cacheprovider
        return
    folder = config.cache.mkdir("programs")
    is_worker = hasattr(config, "workerinput")
    if not is_worker and sum(f.stat().st_size for f in folder.iterdir()) > MOST_KEPT_BYTES:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drops compiled programs between modules before they are too many for the system."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Programs of tiny models are not optimised: compiling is most of what they take.

    A hook, not a fixture: it comes before the fixtures of a module, whose programs it is about too.
    """
    real = item.get_closest_marker("real") is not None
    jax.config.update("jax_disable_most_optimizations", not real)


@pytest.fixture
def quick() -> None:
    """Nor are those of a test of the real model: for a few short rows."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for the length of one test: algebra is checked to 1e-9."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text lines beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> "Loaded":
    """The real SmolLM2-135M in float32, read once a test run."""
    from softprompt.pretrained.loading import load_model

    return load_model("smollm2-135m-instruct-q4", dtype="float32")


@pytest.fixture
def tiny(x64: None) -> "tuple[Decoder, dict[str, Any]]":
    """A tiny random decoder and its weights in float64, with `x64` switched on."""
    from tests.tiny import tiny_decoder

    return tiny_decoder()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder as a Hugging Face folder in float32: `load_model(str(tiny_folder))`."""
    from tests.tiny import write_llama_folder

    return write_llama_folder(tmp_path_factory.mktemp("models") / "tiny")
