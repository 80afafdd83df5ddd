import subprocess
import sys

import nbformat
import pytest

from nucseg import notebooks
from nucseg.notebooks import NOTEBOOKS, NotebookFailed, ParameterError


def write(path, *cells):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(code, metadata={"tags": tags}) for code, tags in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    return tmp_path


def test_an_unknown_parameter_is_refused_with_the_nearest_name(tmp_path):
    path = write(tmp_path / "a.ipynb", ("profile = 'sample'\nk1 = 3\nrate = 1.0", ["parameters"]))
    notebooks.check_parameters(path, {"k1": 5, "rate": 2})
    with pytest.raises(ParameterError, match="unknown parameter 'profil'; did you mean 'profile'"):
        notebooks.check_parameters(path, {"profil": "h100"})


@pytest.mark.parametrize("value", [2.5, "3", True, None])
def test_a_value_of_another_type_is_refused(tmp_path, value):
    path = write(tmp_path / "a.ipynb", ("k1 = 3", ["parameters"]))
    with pytest.raises(ParameterError, match="'k1' must be int"):
        notebooks.check_parameters(path, {"k1": value})


@pytest.mark.parametrize("code", ["k1 = 3\nk2 = k1 + 1", "k1 = int('3')", "import os", "k1: int = 3"])
def test_a_parameters_cell_with_more_than_literals_is_refused(tmp_path, code):
    path = write(tmp_path / "a.ipynb", (code, ["parameters"]))
    with pytest.raises(ParameterError, match=r"a\.ipynb"):
        notebooks.parameters_of(path)


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="expected one cell tagged 'parameters', found 0"):
        notebooks.parameters_of(write(tmp_path / "a.ipynb", ("k1 = 3", [])))


@pytest.mark.filterwarnings("default")
def test_a_run_passes_parameters_reports_progress_and_writes_a_page(place):
    work = "from nucseg.progress import task\nwith task('counting', 4) as t:\n    t.update(2, 'half')\n"
    work += "    import time; time.sleep(1.2)\nprint('k1 is', k1)"
    write(place / "notebooks" / "01_cps.ipynb", ("k1 = 3", ["parameters"]), (work, []))
    seen = []
    page = notebooks.execute(
        notebooks.find("01"), {"k1": 5}, place / "out", lambda done, text: seen.append((done, text))
    )
    assert "k1 is 5" in page.read_text()
    assert any(text.startswith("counting") for _, text in seen)
    executed = nbformat.read(place / "out" / "01_cps.ipynb", as_version=4)
    assert executed.metadata.kernelspec.name == "python3"


@pytest.mark.filterwarnings("default")
def test_a_notebook_with_output_widgets_is_run_to_its_end(place):
    sliders = """
import ipywidgets
from IPython.display import clear_output
output = ipywidgets.Output()
for i in range(40):
    with output:
        clear_output()
        print(i)
"""
    path = write(place / "in.ipynb", ("k1 = 3", ["parameters"]), *[(sliders, [])] * 8)
    code = "import sys; from pathlib import Path; from nucseg.notebooks import execute\n"
    code += "execute(Path(sys.argv[1]), {}, Path(sys.argv[2]))"
    # In a process of its own: where this fails it waits forever, nearly always in one of the first cells.
    subprocess.run([sys.executable, "-c", code, path, place / "out"], check=True, timeout=180)
    assert (place / "out" / "in.html").is_file()


def test_a_failed_cell_stops_the_run_and_says_how_to_go_on(place):
    write(place / "notebooks" / "01_cps.ipynb", ("k1 = 3", ["parameters"]), ("1 / 0", []))
    write(place / "notebooks" / "02_mask_synthesis.ipynb", ("k1 = 3", ["parameters"]), ("print('ran')", []))
    with pytest.raises(NotebookFailed, match=r"(?s)01_cps\.ipynb, cell 2: ZeroDivisionError.*nucseg reproduce --x"):
        notebooks.reproduce({"k1": 4}, place / "out", {}, NOTEBOOKS[:2], "nucseg reproduce --x")
    assert (place / "out" / "01_cps.ipynb").is_file()
    assert not (place / "out" / "02_mask_synthesis.ipynb").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_our_notebooks_follow_the_rules_of_the_house(name):
    path = notebooks.find(name)
    parameters = notebooks.parameters_of(path)
    assert {"profile": "sample", "dataset": "", "data_root": ""}.items() <= parameters.items()
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 400_000
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "../" not in code
    assert "sys.path" not in code
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    long = [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.source.count("\n") > 40]
    assert not long, "a long cell belongs in the library"


def test_a_kernel_that_dies_says_what_to_go_on_with(place):
    path = write(place / "notebooks" / "a.ipynb", ("x = 1", ["parameters"]), ("import os; os._exit(9)", []))
    with pytest.raises(NotebookFailed, match=r"(?s)a.ipynb: .*died.*go on with: nucseg reproduce --from 03"):
        notebooks.execute(path, {}, place / "out", resume="nucseg reproduce --from 03")


def test_minutes_of_no_notebook_are_refused_before_anything_runs(place):
    with pytest.raises(ValueError, match=r"04_segmentatoin.*04_segmentation"):
        notebooks.reproduce({}, place / "out", {"04_segmentatoin": 2.0})
