"""`methods/` and `search/` are imported as `prunesearch.*`, wherever a worker starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from web import make_run

import prunesearch.methods

WORKER = """
import os
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=0)
def where():
    import methods, prunesearch.methods
    return os.getcwd(), methods.MARK, prunesearch.methods.__path__[0]
print(*ray.get(where.remote()), sep="\\n")
ray.shutdown()
"""


def test_worker_in_a_folder_with_another_methods_imports_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "methods"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("MARK = 'theirs'\n")
    (tmp_path / "start.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "start.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    _, mark, ours = done.stdout.strip().splitlines()[-3:]
    assert mark == "theirs"
    assert Path(ours).samefile(Path(prunesearch.methods.__path__[0]))


def test_wheel_holds_every_package(tmp_path: Path) -> None:
    """The list in pyproject.toml names each folder with Python files."""
    import tomllib

    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        "prunesearch." + ".".join(path.parent.relative_to(root).parts)
        for top in ("methods", "search")
        for path in (root / top).rglob("*.py")
    }
    assert set(listed) == folders


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import prunesearch.search.cli\n"
        "assert not {'torch', 'ray', 'pandas', 'optuna'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_looking_at_a_run_imports_nothing_heavy(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one", 5)
    for words in (["status", str(run)], ["front", str(run)], ["list", str(tmp_path)]):
        script = (
            "import sys\n"
            "from prunesearch.search import cli\n"
            f"sys.argv = ['prune-search', *{words}]\n"
            "try: cli.main()\n"
            "except SystemExit as ended: assert not ended.code\n"
            "heavy = {'torch', 'ray', 'optuna', 'pandas', 'scipy', 'sklearn'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_methods_never_import_the_search() -> None:
    script = (
        "import sys\n"
        "import prunesearch.methods.block_removal, prunesearch.methods.surgery\n"
        "import prunesearch.methods.tasks.classification, prunesearch.methods.criteria\n"
        "assert not [m for m in sys.modules if m.startswith(('prunesearch.search', 'ray'))]\n"
        "assert 'optuna' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
