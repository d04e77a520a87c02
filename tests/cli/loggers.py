"""A logger whose server is down."""

from lightning.pytorch.loggers import Logger


class Down(Logger):
    """Raises in every method.

    Args:
        at_start: Also when it is started.
    """

    def __init__(self, at_start: bool = False) -> None:
        self.at_start, self.started = at_start, False

    def _fail(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    name = version = "down"
    log_metrics = log_hyperparams = log_graph = log_image = save = finalize = after_save_checkpoint = _fail

    @property
    def experiment(self):
        if self.started or self.at_start:
            self._fail()
        self.started = True
        return self
