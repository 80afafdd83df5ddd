"""A dataset and a profile small enough to run whole experiments in seconds, and experiments that cost nothing."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from nucseg.data.tissue import generate_tissue
from nucseg.runs.plan import Plan
from nucseg.store import Store

TINY = Path(__file__).parent / "tiny.yaml"
ROWS = "rows: {III: [rndcrop-naive, ours, full]}"


def small_data(folder: Path) -> Path:
    """Write one image each to train, val and test."""
    for split in ("train", "val", "test"):
        image, labels = generate_tissue("glandular", (128, 128), seed=len(split))
        for name in ("images", "labels"):
            (folder / split / name).mkdir(parents=True)
        Image.fromarray(image).save(folder / split / "images" / f"{split}.png")
        Image.fromarray(labels.astype("uint16")).save(folder / split / "labels" / f"{split}.png")
    return folder


def small_profile(path: Path, rows: str = "{III: [rndcrop-naive, ours, full]}", **changes: str) -> Path:
    """Write tests/tiny.yaml with other rows and with lines replaced by name, for example ``random_seeds="[1, 2]"``."""
    text = TINY.read_text().replace(ROWS, f"rows: {rows}")
    lines = [
        next((f"  {name}: {value}" for name, value in changes.items() if line.startswith(f"  {name}:")), line)
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


class NoWork(Store):
    """A store whose stages cost nothing: the numbers are made up."""

    def get(self, stage, config, make, inputs=(), code=()):
        def nothing(folder: Path) -> dict:
            if stage == "selection":
                (folder / "selection.json").write_text(json.dumps(SELECTION))
            if stage == "evaluation":
                (folder / "metrics.csv").write_text(METRICS)
            return {"validation_aji": 0.5, "pairs": {"real": 2}, "peak_gpu_mb": None, "initialised_from": "nothing"}

        return super().get(stage, config, nothing, inputs, code)


SELECTION = {
    **{"strategy": "random-crop", "patches": [], "clusters": None, "terms": None},
    **{"label_share": 0.05, "switches": {}, "notes": []},
}


METRICS = "image_id,organ,seen,dice,aji,aji_plus,dq,sq,pq,f1,n_true,n_pred\n" + "".join(
    f"image{i:02},o,1,{','.join(['0.5'] * 7)},3,3\n" for i in range(14)
)


def no_op_plan(profile: Path, data: Path) -> Plan:
    """Return a plan all of whose stages are made, and none of whose experiments is in results.csv."""
    plan = Plan(profile, str(data), device="cpu")
    plan.pipeline.store = NoWork(plan.pipeline.store.root)
    for experiment in plan.experiments:
        plan.pipeline.run(experiment)
    plan.pipeline.store = Store(plan.pipeline.store.root)
    return plan
