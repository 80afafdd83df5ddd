import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nucseg.code_version import code_version
from nucseg.store import OutOfTime, Result, Store, claimed, environment, holder, home


def make_text(text):
    def make(folder):
        (folder / "out.txt").write_text(text)
        return {"note": text}

    return make


def fail(folder):
    raise AssertionError("made again")


def test_a_result_is_made_once_and_found_again(tmp_path):
    store = Store(tmp_path)
    first = store.get("masks", {"count": 2}, make_text("a"), code=["nucseg.config"])
    again = Store(tmp_path).get("masks", {"count": 2}, fail, code=["nucseg.config"])
    assert again.path == first.path
    assert (again.path / "out.txt").read_text() == "a"
    assert again.meta["note"] == "a"
    assert {"seconds", "torch", "device", "started"} <= set(again.meta)


@pytest.mark.parametrize(
    ("config", "inputs", "code"),
    [({"count": 3}, ["x"], ["nucseg.config"]), ({"count": 2}, ["y"], ["nucseg.config"]), ({"count": 2}, ["x"], [])],
)
def test_a_changed_setting_input_or_code_makes_another_result(tmp_path, config, inputs, code):
    store = Store(tmp_path)
    old = store.get("masks", {"count": 2}, make_text("a"), ["x"], ["nucseg.config"])
    new = store.get("masks", config, make_text("b"), inputs, code)
    assert new.key != old.key
    assert (old.path / "out.txt").read_text() == "a"


def test_what_another_profile_has_made_is_taken_from_there(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    made = Store(runs / "one").get("masks", {"count": 2}, make_text("a"))
    (runs / "killed" / "masks" / made.key).mkdir(parents=True)  # without meta.json: never finished
    other = Store(runs / "two", others=runs)
    with other.until(-float("inf")):
        assert other.get("masks", {"count": 2}, fail) == made  # only looked at, where it is
    assert not (other.root / "masks").exists()
    taken = other.get("masks", {"count": 2}, fail)
    assert taken == Store(runs / "two").get("masks", {"count": 2}, fail)
    assert taken.path == other.root / "masks" / made.key
    assert taken.meta == made.meta
    assert (taken.path / "out.txt").samefile(made.path / "out.txt")

    def no_links(source, target):
        raise OSError("operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    copied = Store(runs / "three", others=runs).get("masks", {"count": 2}, fail)
    assert (copied.path / "out.txt").read_text() == "a"
    assert not (copied.path / "out.txt").samefile(made.path / "out.txt")
    lost = Store(runs / "lost", others=runs)
    monkeypatch.setattr(lost, "_elsewhere", lambda place: Result(runs / "gone", made.key, made.meta))
    assert lost.get("masks", {"count": 2}, make_text("b")).meta["note"] == "b"  # removed while it was taken
    shutil.rmtree(runs / "one")
    assert (taken.path / "out.txt").read_text() == "a"
    alone = Store(runs / "four")
    with alone.until(-float("inf")), pytest.raises(OutOfTime):
        alone.get("masks", {"count": 2}, fail)


def test_a_stage_that_fails_leaves_nothing_behind(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(AssertionError, match="made again"):
        store.get("masks", {}, fail)
    assert list(store.results("masks")) == []
    assert not list((tmp_path / "masks").glob("*.part"))


def test_a_run_killed_inside_a_stage_loses_that_stage_alone(tmp_path):
    script = textwrap.dedent(f"""
        import time
        from nucseg.store import Store
        store = Store({str(tmp_path)!r})
        def first(folder): (folder / "out.txt").write_text("first")
        def second(folder):
            (folder / "half.txt").write_text("half")
            print("in second", flush=True)
            time.sleep(60)
        a = store.get("a", {{}}, first)
        store.get("b", {{}}, second, [a.key])
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in second\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path)
    a = store.get("a", {}, fail)
    b = store.get("b", {}, make_text("whole"), [a.key])
    assert sorted(p.name for p in b.path.iterdir()) == ["meta.json", "out.txt"]
    assert not list((tmp_path / "b").glob("*.part"))


def test_two_processes_make_a_result_once(tmp_path):
    script = textwrap.dedent(f"""
        import os, time
        from nucseg.store import Store
        def make(folder):
            time.sleep(0.5)
            open({str(tmp_path / "log")!r}, "a").write("made\\n")
        Store({str(tmp_path)!r}).get("a", {{}}, make)
    """)
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_code_version_ignores_comments_and_docstrings_only(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def version(source):
        (tmp_path / "scratch_module.py").write_text(source)
        code_version.cache_clear()
        return code_version("scratch_module")

    plain = version("def f(x):\n    return x + 1\n")
    assert version('"""Doc."""\ndef f(x):  # why\n    """Add."""\n    return (x + 1)\n') == plain
    assert version("def f(x):\n    return x + 2\n") != plain
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        code_version("no_such_module")


def test_code_version_is_the_same_under_every_version_of_python(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "frozen_module.py").write_text("class A:\n    def f(self, *, x=()):\n        return [x]\n\nimport os\n")
    assert code_version("frozen_module") == "39f126676d68"


def test_a_result_can_be_read_by_whoever_may_read_the_users_files(tmp_path):
    before = os.umask(0o022)
    try:
        made = Store(tmp_path / "a", others=tmp_path).get("s", {}, make_text("x"))
        taken = Store(tmp_path / "b", others=tmp_path).get("s", {}, fail)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (made.path, taken.path)] == [0o755, 0o755]


def test_what_a_cpu_made_beside_a_gpu_is_not_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "some GPU")
    environment.cache_clear()
    devices = [
        Store(tmp_path / f"at{name}", device=name).get("s", {}, make_text("x")).meta["device"]
        for name in ("", "cpu", "cuda")
    ]
    environment.cache_clear()
    assert devices == ["some GPU", f"{os.cpu_count()} CPU cores", "some GPU"]


def test_home_is_the_checkout_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    assert home() == tmp_path.resolve()
    monkeypatch.delenv("NUCSEG_HOME")
    assert (home() / "notebooks").is_dir()


def test_after_the_deadline_what_is_there_is_found_and_nothing_is_begun(tmp_path):
    store = Store(tmp_path)
    first = store.get("a", {}, make_text("a"))
    with store.until(time.time() - 1):
        assert store.get("a", {}, fail).key == first.key
        with pytest.raises(OutOfTime, match="b"):
            store.get("b", {}, fail, [first.key])
    assert not (tmp_path / "b").exists()
    assert store.get("b", {}, make_text("b"), [first.key]).meta["note"] == "b"


def test_a_claim_is_seen_by_others_and_falls_with_its_holder(tmp_path):
    path = tmp_path / "running" / "a.json"
    assert holder(path) is None
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from nucseg.store import claimed
        with claimed(Path({str(path)!r}), "first") as ours:
            print(ours, flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    assert holder(path) == "first"
    with claimed(path, "second") as ours:
        assert not ours
    assert holder(path) == "first"
    process.kill()
    process.wait()
    process.stdout.close()
    assert holder(path) is None
    with claimed(path, "second") as ours:
        assert ours
        assert holder(path) == "second"
    assert holder(path) is None


def test_what_a_killed_run_left_is_cleared_away_also_a_half_written_state_and_a_half_deleted_result(tmp_path):
    store = Store(tmp_path)
    made = store.get("model", {"count": 2}, make_text("a"))
    (made.path / "meta.json").unlink()  # somebody was deleting it
    (made.path.parent / f".{made.key}.state.123.part").write_bytes(b"half")
    (made.path.parent / f".{made.key}.abc.part").mkdir()
    again = store.get("model", {"count": 2}, make_text("b"))
    assert (again.path / "out.txt").read_text() == "b"
    assert not list(again.path.parent.glob(".*.part"))
