"""Text for training, calibration and held-out tests: sources, splits and token windows.

`split.py` cuts and splits, `pydocs.py`, `textfile.py` and `hub.py` are the sources, `documents.py`
picks one, `tokens.py` makes windows of tokens.
"""

from kvsmith.pipeline.data.documents import DataConfig, data_name, load_documents
from kvsmith.pipeline.data.hub import HubData
from kvsmith.pipeline.data.pydocs import PydocsData
from kvsmith.pipeline.data.split import Split
from kvsmith.pipeline.data.textfile import TextfileData
from kvsmith.pipeline.data.tokens import token_blocks, token_stream, tokens_hash

__all__ = [
    "DataConfig",
    "HubData",
    "PydocsData",
    "Split",
    "TextfileData",
    "data_name",
    "load_documents",
    "token_blocks",
    "token_stream",
    "tokens_hash",
]
