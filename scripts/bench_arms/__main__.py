"""Run one job: `python -m bench_arms JOB.json ANSWER.json`."""

import json
import logging
import sys
import warnings
from pathlib import Path

from bench_arms.arms import run_job
from bench_arms.job import Job

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    run_job(Job(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
