"""One experiment, stage by stage: the only module that joins stages.

    features -> selection -> masks -> synthesis -> training -> (pseudo labels -> training) x rounds -> evaluation

Each arrow is a folder in the store, named by all that it depends on, so experiments that share a stage share its
result: the rows of Table I differ from the selection on, those of Table II from the synthesis on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from nucseg import gan, metrics, models
from nucseg.config import to_plain
from nucseg.data import Dataset, Patch, load_dataset
from nucseg.encoders import Encoder
from nucseg.experiments import Experiment
from nucseg.masks import synthesize_masks
from nucseg.models.base import Segmenter
from nucseg.profiles import Profile, load_profile
from nucseg.progress import task
from nucseg.pseudo import pseudo_pairs
from nucseg.selection import PatchFeatures, Selection, extract, select
from nucseg.store import Result, Store, home, published
from nucseg.training import train

Pair = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) uint8, label map (H, W) int32

SELECTION_CODE = ("nucseg.selection", "nucseg.encoders")
MODEL_CODE = ("nucseg.models", "nucseg.training", "nucseg.augment", "nucseg.inference", "nucseg.encoders")


class Pipeline:
    """The stages of one profile on one dataset.

    Parameters
    ----------
    profile
        A profile or its name: ``"sample"``, ``"h100"``, ``"paper"`` or the path of a YAML file.
    dataset
        A dataset or its name; the profile's own default when empty.
    data_root
        Where data lie; ``NUCSEG_DATA`` when empty.
    device
        ``"cuda"`` where there is one, else ``"cpu"``, when empty.
    results
        The folder of results; ``runs/<profile>`` in the checkout when None.
    """

    def __init__(
        self,
        profile: Profile | str = "sample",
        dataset: Dataset | str = "",
        data_root: str | Path = "",
        device: str = "",
        results: str | Path | None = None,
    ):
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        name = dataset or self.profile.dataset
        self.dataset = load_dataset(name, data_root or None) if isinstance(name, str) else name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.store = Store(results or home() / "runs" / self.profile.name)

    # -- which pixels ------------------------------------------------------------------------------------------

    @cached_property
    def _features(self) -> tuple[PatchFeatures, Result]:
        config, encoder = self.profile.selection, self.profile.encoder

        def make(folder: Path) -> None:
            net = Encoder(encoder, normalise=config.normalise)
            with task(f"features by {encoder}") as progress:
                features = extract(self.dataset.train, net, config, self.device, progress)
            np.savez(folder / "features.npz", **features.to_arrays())

        describes = {"encoder": encoder, "size": config.size, "step": config.step, "normalise": config.normalise}
        result = self.store.get("features", describes, make, [self.dataset.fingerprint], SELECTION_CODE)
        with np.load(result.path / "features.npz", allow_pickle=False) as arrays:
            return PatchFeatures.from_arrays(dict(arrays)), result

    def features(self) -> PatchFeatures:
        """Return f(x) and f(x_p) of every training patch (Sec. III-A)."""
        return self._features[0]

    def selection(self, experiment: Experiment) -> tuple[Selection, Result]:
        """Return the patches that an experiment annotates."""
        chosen = (experiment.selection, experiment.k1, experiment.k2, experiment.seed)
        random = experiment.selection.startswith("random")
        config = self.profile.selection

        def make(folder: Path) -> None:
            with task(f"selection by {experiment.selection}"):
                selection = select(
                    self.dataset.train,
                    *chosen[:3],
                    size=config.size,
                    step=config.step,
                    seed=experiment.seed,
                    config=config,
                    features=None if random else self.features(),
                )
            (folder / "selection.json").write_text(json.dumps(selection.to_dict()))

        inputs = [self.dataset.fingerprint, "" if random else self._features[1].key]
        result = self.store.get("selection", (chosen, config), make, inputs, SELECTION_CODE)
        return Selection.from_dict(json.loads((result.path / "selection.json").read_text())), result

    def annotate(self, patches: tuple[Patch, ...]) -> list[Pair]:
        """Return the images and label maps of patches: what the pathologist is asked for, here cut from the truth."""
        samples = {sample.id: sample for sample in self.dataset.train}
        return [
            (samples[p.image_id].image[p.slices], samples[p.image_id].labels[p.slices].astype(np.int32))
            for p in patches
        ]

    # -- more pairs --------------------------------------------------------------------------------------------

    def masks(self, experiment: Experiment) -> tuple[np.ndarray, Result]:
        """Return synthetic label maps, (k1, count, size, size) int32, from the annotated patches (Sec. III-B)."""
        selection, chosen = self.selection(experiment)
        size, count, config = self.profile.selection.size, self.profile.mask_count, self.profile.masks

        def make(folder: Path) -> None:
            pairs = self.annotate(selection.patches)
            with task("mask synthesis", len(pairs)) as progress:
                masks = []
                for i, (_, labels) in enumerate(pairs):
                    if labels.any():
                        seed = int(np.random.SeedSequence([experiment.seed, i]).generate_state(1)[0])
                        masks.append(synthesize_masks(labels, count, size, seed, config))
                    else:  # a patch without a nucleus has nothing to place: its masks are as empty as itself
                        masks.append(np.zeros((count, size, size), np.int32))
                    progress.update(i + 1)
            np.savez_compressed(folder / "masks.npz", masks=np.stack(masks).astype(np.uint16))

        result = self.store.get("masks", (config, size, count, experiment.seed), make, [chosen.key], ["nucseg.masks"])
        with np.load(result.path / "masks.npz", allow_pickle=False) as arrays:
            return arrays["masks"].astype(np.int32), result

    def synthesiser(self, experiment: Experiment) -> Result:
        """Train the generators of an experiment: ``generator.safetensors``, ``images.npz`` and ``history.npz``."""
        selection, chosen = self.selection(experiment)
        masks, masked = self.masks(experiment)
        name = experiment.augmentation
        config = self.profile.synthesiser(name)

        def make(folder: Path) -> None:
            synthesiser = gan.build(name, config, self.device)
            with task(f"training {name}") as progress:
                synthesiser.fit(self.annotate(selection.patches), masks, seed=experiment.seed, progress=progress)
            with task(f"images by {name}"):
                images = synthesiser.generate(masks, seed=experiment.seed)
            np.savez_compressed(folder / "images.npz", images=images)
            save_file(synthesiser.to_tensors(), folder / "generator.safetensors")
            curves = {f"scale{i}": losses.numpy() for i, losses in enumerate(synthesiser.history)}
            np.savez_compressed(folder / "history.npz", terms=np.array(synthesiser.terms), **curves)

        key = (name, config, experiment.seed, self.device.type)
        return self.store.get("synthesis", key, make, [chosen.key, masked.key], ["nucseg.gan"])

    def synthetic(self, experiment: Experiment) -> tuple[list[Pair], Result]:
        """Return the synthetic pairs of an experiment; their instances come from mask synthesis itself (A27)."""
        masks, _ = self.masks(experiment)
        result = self.synthesiser(experiment)
        with np.load(result.path / "images.npz", allow_pickle=False) as arrays:
            images = arrays["images"]
        size = images.shape[2]
        return list(zip(images.reshape(-1, size, size, 3), masks.reshape(-1, size, size), strict=True)), result

    # -- segmentation ------------------------------------------------------------------------------------------

    def build(self, experiment: Experiment) -> Segmenter:
        """Return the untrained segmenter of an experiment, its encoder pretrained."""
        config = self.profile.segmenter(experiment.segmenter)
        return models.build(experiment.segmenter, encoder=self.profile.segmenter_encoder, config=config)

    def model(self, experiment: Experiment, round: int = 0) -> Result:
        """Train the segmenter of an experiment, from the start in every pseudo-labelling round (A35)."""
        groups: dict[str, list[Pair]] = {}
        inputs = [self.dataset.fingerprint]
        if experiment.supervision == "full":
            groups["real"] = [(sample.image, sample.labels) for sample in self.dataset.train]
        else:
            selection, chosen = self.selection(experiment)
            groups["real"] = self.annotate(selection.patches)
            inputs.append(chosen.key)
        if experiment.augmentation in gan.REGISTRY:
            groups["synthetic"], synthetic = self.synthetic(experiment)
            inputs.append(synthetic.key)
        if round > 0:
            groups["pseudo"], pseudo = self.pseudo(experiment, round)
            inputs.append(pseudo.key)
        name = experiment.segmenter
        training = self.profile.training_of(name)
        augment = None if experiment.augmentation == "none" else self.profile.augment

        def make(folder: Path) -> dict:
            torch.manual_seed(experiment.seed)  # the initial weights of the heads
            model = self.build(experiment).to(self.device)
            pairs = [pair for group in groups.values() for pair in group]
            title = f"training {name}" + (f", round {round}" if round else "")
            with task(title, training.iterations) as progress:
                result = train(
                    model,
                    pairs,
                    training,
                    seed=experiment.seed,
                    augment=augment,
                    validate=self._validate if self.dataset.val else None,
                    device=self.device,
                    progress=lambda row: progress.update(row["iteration"], f"loss {row['total']:.2f}"),
                    pair_weights=self.profile.mix.weights({kind: len(group) for kind, group in groups.items()}),
                )
            save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
            (folder / "curve.json").write_text(json.dumps(result.curve))
            return {
                "validation_aji": result.curve[-1].get("val"),
                "pairs": {kind: len(group) for kind, group in groups.items()},
                "peak_gpu_mb": result.peak_memory // 2**20 or None,
            }

        config = {
            "segmenter": (name, self.profile.segmenter(name), self.profile.segmenter_encoder),
            "training": (training, augment, self.profile.mix),
            "seed": experiment.seed,
            "device": self.device.type,
        }
        return self.store.get("model", config, make, inputs, MODEL_CODE)

    def curve(self, experiment: Experiment, round: int = 0) -> pd.DataFrame:
        """Return the learning curve of a training: iteration, learning rate, total loss and its terms."""
        return pd.DataFrame(json.loads((self.model(experiment, round).path / "curve.json").read_text()))

    def _validate(self, model: Segmenter) -> float:
        return float(np.mean([metrics.aji(sample.labels, model.predict(sample.image)) for sample in self.dataset.val]))

    def load_model(self, experiment: Experiment, round: int = 0) -> tuple[Segmenter, Result]:
        """Return the trained segmenter of an experiment, training it first where that has not been done."""
        result = self.model(experiment, round)
        model = self.build(experiment)
        model.load_state_dict(load_file(result.path / "model.safetensors"))
        return model.to(self.device).eval(), result

    def pseudo(self, experiment: Experiment, round: int) -> tuple[list[Pair], Result]:
        """Return the pseudo-labelled crops of the training images that round `round` adds (Sec. III-C, A34)."""
        config = self.profile.pseudo
        teacher = self.model(experiment, round - 1)

        def make(folder: Path) -> dict:
            model, _ = self.load_model(experiment, round - 1)
            patches = self.selection(experiment)[0].patches
            annotated = [
                [(p.row, p.col, p.size, s.labels[p.slices]) for p in patches if p.image_id == s.id]
                for s in self.dataset.train
            ]
            images = [sample.image for sample in self.dataset.train]
            with task(f"pseudo labels, round {round}"):
                made = pseudo_pairs(model.predict_instances, images, annotated, config, experiment.seed + round)
            crops = np.stack([image for image, _ in made.pairs])
            labels = np.stack([labels for _, labels in made.pairs]).astype(np.uint16)
            np.savez_compressed(folder / "pairs.npz", images=crops, labels=labels)
            return {"kept": made.kept, "dropped": made.dropped}

        result = self.store.get("pseudo", (config, round, experiment.seed), make, [teacher.key], ["nucseg.pseudo"])
        with np.load(result.path / "pairs.npz", allow_pickle=False) as arrays:
            return list(zip(arrays["images"], arrays["labels"].astype(np.int32), strict=True)), result

    # -- numbers -----------------------------------------------------------------------------------------------

    def evaluate(self, experiment: Experiment, round: int = 0) -> Result:
        """Segment the test images: ``metrics.csv``, one line per image, and ``predictions.npz``, the label maps."""
        trained = self.model(experiment, round)

        def make(folder: Path) -> dict:
            model, _ = self.load_model(experiment, round)
            rows, predictions = [], {}
            with task("test images", len(self.dataset.test)) as progress:
                for i, sample in enumerate(self.dataset.test):
                    predictions[sample.id] = model.predict(sample.image).astype(np.uint16)
                    scores = metrics.evaluate(sample.labels, predictions[sample.id].astype(np.int32))
                    rows.append({"image_id": sample.id, "organ": sample.organ, "seen": int(sample.seen), **scores})
                    progress.update(i + 1)
            pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
            np.savez_compressed(folder / "predictions.npz", **predictions)
            return {"aji": float(np.mean([row["aji"] for row in rows]))}

        return self.store.get("evaluation", {}, make, [trained.key], ["nucseg.metrics", *MODEL_CODE])

    def predictions(self, experiment: Experiment, round: int = 0) -> dict[str, np.ndarray]:
        """Return the label map that an experiment predicts for each test image, by image id."""
        with np.load(self.evaluate(experiment, round).path / "predictions.npz", allow_pickle=False) as arrays:
            return {name: arrays[name].astype(np.int32) for name in arrays}

    def run(self, experiment: Experiment) -> pd.DataFrame:
        """Run an experiment and return its rows for ``results.csv``: the last round's, and the best one's.

        The best round is the one with the highest validation AJI; the last one is what the paper reports.
        """
        share = 1.0 if experiment.supervision == "full" else self.selection(experiment)[0].label_share
        best = self._best_round(experiment)
        frames = []
        for r in sorted({best, experiment.rounds}):
            result = self.evaluate(experiment, r)
            frame = pd.read_csv(result.path / "metrics.csv", dtype={"image_id": str})
            known = {
                "profile": self.profile.name,
                "fingerprint": self.dataset.fingerprint,
                **to_plain(experiment),
                "encoder": self.profile.segmenter_encoder,
                "supervision": experiment.supervision,
                "round": r,
                "best": int(r == best),
                "label_share": share,
                "run_id": result.run_id,
            }
            frames.append(frame.assign(**known))
        return pd.concat(frames, ignore_index=True)

    def _best_round(self, experiment: Experiment) -> int:
        rounds = range(experiment.rounds + 1)
        validation = [self.model(experiment, r).meta["validation_aji"] for r in rounds]
        if None in validation:  # no validation images: the last round, as in the paper
            return experiment.rounds
        return max(rounds, key=validation.__getitem__)

    def runs(self, experiment: Experiment) -> pd.DataFrame:
        """Return an experiment's lines for ``runs.csv``: what each reported run took, on what, with which settings.

        Seconds are those of the run's own training, pseudo-labelling and test; ``shared_seconds`` in the configuration
        are those of the selection and synthesis that it shares with other runs.
        """
        lines = []
        for r in sorted({self._best_round(experiment), experiment.rounds}):
            own = [self.model(experiment, r), self.evaluate(experiment, r)]
            own += [self.pseudo(experiment, r)[1]] if r else []
            shared = [] if experiment.supervision == "full" else [self.selection(experiment)[1]]
            if experiment.augmentation in gan.REGISTRY:
                shared += [self.masks(experiment)[1], self.synthesiser(experiment)]
            trained = own[0].meta
            config = {
                "experiment": to_plain(experiment),
                "model": trained["config"],
                "pairs": trained["pairs"],
                "validation_aji": trained["validation_aji"],
                "shared_seconds": sum(result.meta["seconds"] for result in shared),
            }
            lines.append(
                {
                    "run_id": own[1].run_id,
                    "started": trained["started"],
                    "seconds": round(sum(result.meta["seconds"] for result in own), 1),
                    "device": trained["device"],
                    "versions": f"nucseg {trained['nucseg']}, python {trained['python']}, torch {trained['torch']}",
                    "peak_gpu_mb": trained["peak_gpu_mb"],
                    "config": json.dumps(config, sort_keys=True),
                }
            )
        return pd.DataFrame(lines)

    def signature(self) -> str:
        """Return the line under every figure: profile, dataset, and that a tissue is synthetic."""
        parts = [f"profile {self.profile.name}", f"dataset {self.dataset.name} {self.dataset.fingerprint[:8]}"]
        return "  ·  ".join(parts + [self.dataset.note] * bool(self.dataset.note))

    def figure_path(self, name: str) -> Path:
        """Return where a figure of this profile and dataset goes, as ``figures/<profile>/<name>_<dataset>.png``."""
        return published("figures", self.profile.name) / f"{name}_{Path(self.dataset.name).name}.png"

    def experiment(self, **changes) -> Experiment:
        """Return the profile's own experiment on this dataset ("Ours"), with changes by name."""
        return replace(self.profile.ours(self.dataset.name), **changes)
