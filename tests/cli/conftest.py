import logging
from collections.abc import Iterator

import pytest

from mptqc.cli.progress import set_quiet


@pytest.fixture(autouse=True)
def _global_options_end_with_the_test() -> Iterator[None]:
    """Commands set the log level and quietness of the process; give them back."""
    logger = logging.getLogger("mptqc")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
    set_quiet(False)
