"""`python -m stages SPEC_URI`: runs one stage from its spec, anywhere."""

from __future__ import annotations

import argparse
import logging
import sys

from data import storage
from data.errors import DarkroomError
from stages.catalogue import check_spec, run_spec
from stages.cluster import cluster
from stages.contract import StageSpec

log = logging.getLogger("darkroom")


def main() -> int:
    """Exit code: 0 when the snapshot is there, 1 when the stage failed, 2 when the spec or its input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("spec", help="path or URL of a StageSpec as JSON")
    parser.add_argument(
        "--address", default="local", help="local, auto, or HOST:PORT of a Ray cluster (default: local)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        spec = StageSpec.model_validate_json(storage.read_bytes(arguments.spec))
        with cluster(arguments.address):
            check_spec(spec)
            snapshot = run_spec(spec)
    except (ValueError, FileNotFoundError) as error:
        log.error("%s", error)
        return 2
    except DarkroomError as error:
        log.error("%s", error)
        return 1
    log.info("%s %s", snapshot.stage, snapshot.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
