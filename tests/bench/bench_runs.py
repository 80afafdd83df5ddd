"""What a run costs beside its experiments: 200 experiments whose stages are all made already, per experiment.

    python tests/bench/bench_runs.py [EXPERIMENTS]

Prints milliseconds per experiment, one after another and in two processes (which first open profile and data), the
rows in results.csv, and what it takes to read, check and write the whole table once, as was once done for every
experiment.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["NUCSEG_QUIET"] = "1"

from joblib import Parallel, delayed
from small import no_op_plan, small_data, small_profile

from nucseg.results import check_results, read_results


def main(count: int = 200) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["NUCSEG_HOME"] = str(place)
        seeds = str(list(range(1, count + 1)))
        profile = small_profile(place / "noop.yaml", "{III: [rndcrop-naive]}", random_seeds=seeds)
        plan = no_op_plan(profile, small_data(place / "tiny"))
        for jobs in (1, 2):
            for name in ("results.csv", "runs.csv"):
                plan.results_file.with_name(name).unlink(missing_ok=True)
            if jobs > 1:  # processes that have imported everything
                Parallel(n_jobs=jobs)(delayed(__import__)(name) for name in ["nucseg.runs.running"] * jobs)
            start = time.perf_counter()
            failed = plan.run(jobs)
            each = 1000 * (time.perf_counter() - start) / count
            rows = len(read_results(plan.results_file))
            print(
                f"{jobs} process(es): {each:.1f} ms per experiment; {rows} rows of {14 * count}, {len(failed)} failed"
            )
        start = time.perf_counter()
        check_results(read_results(plan.results_file)).to_csv(place / "again.csv", index=False)
        print(f"reading, checking and rewriting all rows once: {1000 * (time.perf_counter() - start):.1f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
