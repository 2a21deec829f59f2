"""The notebook runs from top to bottom in a fresh kernel, shows what it says, and is committed without outputs."""

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'test'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'test'")
pytest.importorskip("ipykernel", reason="needs the extra 'test'")
pytest.importorskip("pygraphviz", reason="needs the extra 'draw'")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def shown(cell: Any) -> str:
    """All that a cell displays, in every form."""
    texts = [output.get("text", "") for output in cell.outputs]
    return "\n".join(texts + [str(data) for output in cell.outputs for data in output.get("data", {}).values()])


def test_no_outputs_are_committed() -> None:
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read()
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = {cell.source.splitlines()[0]: shown(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert "(wide): Conv2d(8, 8, kernel_size=(3, 3)" in outputs["fused = reparam.fuse(net)"]
    assert "rounding explains" in outputs["x = torch.randn(2, 3, 33, 40)"]
    assert outputs["wrong = reparam.fuse(net)"].strip() == "first module where they part: 4"
    assert '<div class="reparam">' in outputs["plan = reparam.plan(net)"]
    assert sum("<svg" in text and "before: 3" in text for text in outputs.values()) == 1
