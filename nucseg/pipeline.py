"""One experiment from its first stage to its rows in ``results.csv`` and ``runs.csv``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg import gan
from nucseg.config import to_plain
from nucseg.experiments import Experiment
from nucseg.stages import Pair, Stages
from nucseg.store import published

__all__ = ["Pair", "Pipeline"]


class Pipeline(Stages):
    """All that is run for one profile on one dataset; parameters are those of `nucseg.stages.Stages`."""

    def run(self, experiment: Experiment) -> pd.DataFrame:
        """Run an experiment and return its rows for ``results.csv``: the last round's, and the best one's.

        The best round is the one with the highest validation AJI; the last one is what the paper reports.

        Raises
        ------
        nucseg.data.MissingData
            Before anything is made, if there are no training or no test images with labels.
        """
        self.dataset.check_experiments()
        if experiment.supervision == "full":
            share, outlined = 1.0, [(sample.id, sample.labels) for sample in self.dataset.train]
        else:
            chosen = self.selection(experiment)
            samples = [self.dataset.sample(patch.image_id) for patch in chosen.patches]
            share = chosen.label_share
            outlined = [(s.id, s.labels[p.slices]) for s, p in zip(samples, chosen.patches, strict=True)]
        # A nucleus that two overlapping patches touch is outlined once.
        nuclei = {(image, label) for image, labels in outlined for label in np.unique(labels[labels > 0])}
        best = self._best_round(experiment)
        frames = []
        for r in sorted({best, experiment.rounds}):
            result = self.evaluated(experiment, r)
            frame = self.scores(experiment, r)
            known = {
                "profile": self.profile.name,
                "fingerprint": self.dataset.fingerprint,
                **to_plain(experiment),
                "encoder": self.encoder_name(experiment),
                "supervision": experiment.supervision,
                "round": r,
                "best": int(r == best),
                "label_share": share,
                "label_nuclei": len(nuclei),
                "run_id": result.run_id,
            }
            frames.append(frame.assign(**known))
        return pd.concat(frames, ignore_index=True)

    def _best_round(self, experiment: Experiment) -> int:
        rounds = range(experiment.rounds + 1)
        validation = [self.trained(experiment, r).meta["validation_aji"] for r in rounds]
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
            own = [self.trained(experiment, r), self.evaluated(experiment, r)]
            taught = self.pseudo_config(experiment).method == "mean-teacher"
            own += [self.pseudo_labelled(experiment, r)] if r and not taught else []
            shared = [] if experiment.supervision == "full" else [self.selected(experiment)]
            if experiment.augmentation in gan.REGISTRY:
                shared += [self.masked(experiment), self.synthesised(experiment)]
            trained = own[0].meta
            config = {
                "experiment": to_plain(experiment),
                **self._upstream_settings(experiment),
                "model": trained["config"],
                "pairs": trained["pairs"],
                "initialised_from": trained["initialised_from"],
                "validation_aji": trained["validation_aji"],
                "recorded_gpu_mb": trained.get("recorded_gpu_mb"),  # not known of older results
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

    def settings(self, experiment: Experiment) -> dict:
        """Return what the profile says of an experiment's stages, arranged as in a line of ``runs.csv``."""
        return {**self._upstream_settings(experiment), "model": to_plain(self.model_settings(experiment))}

    def _upstream_settings(self, experiment: Experiment) -> dict:
        painter = experiment.augmentation
        paints = painter in gan.REGISTRY
        return {
            "selection": to_plain(self.profile.selection) if experiment.supervision == "patches" else None,
            "masks": to_plain(self.profile.masks) if paints else None,
            "synthesis": {painter: to_plain(self.profile.synthesiser(painter))} if paints else None,
        }

    def signature(self) -> str:
        """Return the line under every figure: profile, dataset, and that a tissue is synthetic."""
        parts = [f"profile {self.profile.name}", f"dataset {self.dataset.name} {self.dataset.fingerprint[:8]}"]
        return "  ·  ".join(parts + [self.dataset.note] * bool(self.dataset.note))

    def figure_path(self, name: str) -> Path:
        """Return where a figure of this profile and dataset goes, as ``figures/<profile>/<name>_<dataset>.png``."""
        return published("figures", self.profile.name) / f"{name}_{Path(self.dataset.name).name}.png"

    def table_path(self, name: str) -> Path:
        """Return where a table of this profile and dataset goes, as ``tables/<profile>/<name>_<dataset>.csv``."""
        path = published("tables", self.profile.name) / f"{name}_{Path(self.dataset.name).name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def experiment(self, **changes) -> Experiment:
        """Return the profile's own experiment on this dataset ("Ours"), with changes by name."""
        return replace(self.profile.ours(self.dataset.name), **changes)
