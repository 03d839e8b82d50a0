"""docs/ is one book: every page has its place, every link an end, and the API reference is made from the docstrings."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_book_is_built_without_a_warning(tmp_path: Path) -> None:
    """Seen to fail for a page that no table of contents names, and for a link to a page that is not there."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("fsdp_dp.make_private", "fsdp_dp.PrivacyEngine.loader", "fsdp_dp.PrivacyConfig"):
        assert f'id="{name}"' in reference, name
