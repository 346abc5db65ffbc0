"""The steps of calibration, and what they leave for later steps.

A folder `artifacts/calibration/<model>/<hash8>/` holds `calibration.json` (where the numbers come
from), `statistics/layer-000.safetensors`, ... and `parameters/<codec>/layer-000.safetensors`, ...
`options.py` says what is asked for, `record.py` reads them, `collect.py` makes the statistics of
one shard of the tokens and `shards.py` those of all, `parameters.py` fits any codec that the
statistics reach, also long after the model has gone; `amax.py` looks at rotated keys.
"""

from kvsmith.pipeline.calibration.amax import amax_of, collect_amax
from kvsmith.pipeline.calibration.bases import bases_of
from kvsmith.pipeline.calibration.parameters import fit_stages, owns_parameters, parameters_for
from kvsmith.pipeline.calibration.record import (
    RECORD,
    Record,
    Source,
    check_model,
    describe_model,
    find_calibration,
    read_record,
    read_statistics,
    weights_hash,
)

__all__ = [
    "RECORD",
    "Record",
    "Source",
    "amax_of",
    "bases_of",
    "check_model",
    "collect_amax",
    "describe_model",
    "find_calibration",
    "fit_stages",
    "owns_parameters",
    "parameters_for",
    "read_record",
    "read_statistics",
    "weights_hash",
]
