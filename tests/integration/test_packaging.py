"""The built wheel holds all of fsdp_dp and its configuration, and works away from the checkout, with no download."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a wheel is built from. Copied, so that building leaves nothing in the checkout and finds nothing stale in it.
INPUTS = ("fsdp_dp", "conf", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def copy_of_checkout(directory: Path) -> Path:
    """The build's inputs alone, in `directory`."""
    directory.mkdir()
    for name in INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, directory)
    return directory


def succeed(*command: str, cwd: Path, pythonpath: Path | None = None) -> str:
    """The standard output of a command that must exit with 0, run with only `pythonpath` added to the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str, cwd: Path) -> None:
    succeed(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, cwd=cwd)


def shipped_files(checkout: Path) -> set[str]:
    """The path in the wheel of every source and configuration file of a checkout."""
    code = {path.relative_to(checkout).as_posix() for path in (checkout / "fsdp_dp").rglob("*.py")}
    conf = [path for pattern in ("*.py", "*.yaml") for path in (checkout / "conf").rglob(pattern)]
    return code | {"fsdp_dp/" + path.relative_to(checkout).as_posix() for path in conf}


def unlisted_packages(checkout: Path) -> set[str]:
    """Packages that the tree has and setup.cfg lacks, or the other way round."""
    config = configparser.RawConfigParser()
    config.read(checkout / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {path.parent.relative_to(checkout) for path in (checkout / "fsdp_dp").rglob("*.py")}
    return listed ^ ({".".join(folder.parts) for folder in folders} | {"fsdp_dp.conf"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    checkout = copy_of_checkout(directory / "checkout")
    # The environment's own setuptools: an isolated build would download one.
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", ".", str(checkout), cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel in it and nothing else; torch and the rest stay where they are."""
    directory = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(directory), str(wheel), cwd=directory)
    return directory


def test_setup_cfg_lists_every_package() -> None:
    assert unlisted_packages(ROOT) == set()


def test_an_unlisted_package_is_found(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    (checkout / "fsdp_dp" / "extra").mkdir()
    (checkout / "fsdp_dp" / "extra" / "__init__.py").touch()
    assert unlisted_packages(checkout) == {"fsdp_dp.extra"}


def test_wheel_holds_every_source_and_configuration_file(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped_files(ROOT)


def test_wheel_states_its_dependencies_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert "Requires-Dist: torch>=2.11" in metadata  # a [project] table in pyproject.toml would drop it in silence
    assert "Requires-Python: >=3.11" in metadata


def test_installed_application_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = succeed(sys.executable, "-c", "import fsdp_dp; print(fsdp_dp.__file__)", cwd=tmp_path, pythonpath=installed)
    assert Path(where.strip()).is_relative_to(installed)
    text = succeed(sys.executable, "-m", "fsdp_dp.train", "--help", cwd=tmp_path, pythonpath=installed)
    for group in ("sharding", "model", "data", "privacy", "optimizer", "precision"):
        assert group in text


def test_checkout_wins_over_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    """A job started in a checkout by someone who also installed the wheel reads the checkout's configuration."""
    checkout = copy_of_checkout(tmp_path / "checkout")
    (checkout / "conf" / "privacy" / "only_here.yaml").write_text("# @package _global_\n")
    text = succeed(sys.executable, "-m", "fsdp_dp.train", "--help", cwd=checkout, pythonpath=installed)
    assert "only_here" in text
