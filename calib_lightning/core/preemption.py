"""Save a checkpoint and exit cleanly when a scheduler or a user stops the run."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from calib_lightning.core.finite import DivergedError, guard_saves
from calib_lightning.core.twins import is_twin
from calib_lightning.utils.run_folder import current_run_folder
from calib_lightning.utils.stopping import EXIT_CODES, Stopped, StopRequests, die_of, end_launched

_SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1"))  # Windows has no SIGUSR1
_SAVE = 1  # below every exit code, so the maximum over ranks is the strongest request


class Preempted(Stopped):
    """The run was asked to stop and has saved the checkpoint ``path``, unless its weights were not finite.

    It is a `SystemExit` with ``code`` 143 (SIGTERM) or 130 (SIGINT), so an uncaught one ends the script quietly.
    """

    def __init__(self, code: int, path: Path) -> None:
        super().__init__(code)
        self.path = path


class Preemption(Callback):
    """Turn SIGTERM, SIGINT and SIGUSR1 into a checkpoint from which ``fit`` resumes exactly.

    SIGTERM and SIGINT (Ctrl-C): save, then exit with code 143 or 130. SIGUSR1: save and continue. The handler replaces
    Lightning's, which calls a collective operation inside the signal handler and can deadlock two ranks. Ours only sets
    a flag. After every step the ranks agree on the flag with one all-reduce, so a signal to a single rank is enough;
    all save and exit together. The previous handlers are restored when ``fit`` ends.

    In ``validate``, ``test`` and ``predict``, where Lightning ignores SIGTERM, there is nothing to save: SIGTERM and
    SIGINT end the process at once with the same codes, and those that Lightning has launched from it.

    A signal takes effect at the end of the current training step, unless a checkpoint written there would not resume
    exactly: inside a gradient-accumulation window and before a validation run it waits for the next step, after the
    last step of an epoch for the start of the next epoch or the end of training. A signal during set-up or validation
    waits likewise, so the scheduler's grace period must exceed one validation run. Repeating the signal at least a
    second later ends the process immediately without a checkpoint. Weights that are not finite are not saved, by this
    callback or another: the checkpoint from before stays.

    The callback moves itself to the end of the trainer's list, so the file includes the other callbacks' changes in
    that step. A module's own ``on_train_batch_end`` runs after all callbacks: its changes in that step are lost.

    Exact resuming needs randomness that is a function of the step (`StepSeed`) and a training loader with
    ``state_dict`` and ``load_state_dict``. Under SLURM, Lightning keeps its automatic requeue signal.

    Args:
        dirpath: Folder of the checkpoint; ``None`` uses that of the trainer's first ``ModelCheckpoint``, else
            ``checkpoints`` in ``trainer.default_root_dir``.
        filename: Name of the checkpoint, which each save replaces. With both defaults and a ``ModelCheckpoint``,
            ``ckpt_path="last"`` resumes an interrupted run like any other.

    Raises:
        ValueError: If ``filename`` is a path or does not end in ``.ckpt``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Preemption()], logger=False)
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = "last.ckpt") -> None:
        if Path(filename).name != filename or not filename.endswith(".ckpt"):
            raise ValueError(
                f"filename is {filename!r}; it must be a plain file name that ends in '.ckpt'. Give the folder as "
                "dirpath."
            )
        self.dirpath = dirpath
        self.filename = filename
        self._previous: dict[signal.Signals, Any] = {}
        self._at_once = False
        self._children: list[Any] = []  # processes that Lightning's launcher has started and watches
        self._forget()

    def _forget(self) -> None:
        self._requests = StopRequests()
        self._save_wanted = False
        self._leave_wanted = 0
        self._agreed = 0  # 0, _SAVE or an exit code: the same on all ranks

    # ------------------------------------------------------------------------------------------------- the handlers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the handlers so that they take precedence over Lightning's; guard what is saved."""
        guard_saves(trainer)
        self._at_once = stage != "fit"
        if not self._at_once:
            # The file must include what other callbacks do at the end of a step, but not what they do at the start of
            # an epoch, which the resumed run repeats. A new list, since Lightning is going through the old one.
            others = [callback for callback in _callbacks(trainer) if callback is not self]
            trainer.callbacks = [_EpochStart(self), *others, self]  # type: ignore[attr-defined]  # as in _callbacks
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Preemption is inactive: Python handles signals only in the main thread. Call fit there.")
            return
        self._forget()
        self._children = getattr(trainer.strategy.launcher, "procs", [])
        self._install(trainer)

        # Lightning registers its handlers after the last hook before the loops, and the loops may start many workers
        # before the next hook: no hook is close enough, so its own function is replaced until `_detach`.
        connector = trainer._signal_connector
        register = connector.register_signal_handlers

        def register_below() -> None:
            self._restore()  # Lightning must record the handlers before ours: it restores them at the end
            register()
            self._install(trainer)

        vars(connector)["register_signal_handlers"] = register_below

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the old handlers, unless we are leaving: Lightning then does it after closing the loggers."""
        if not isinstance(exception, Stopped):
            self._restore()
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the old handlers and re-raise a signal that arrived too late."""
        self._restore()
        self._detach(trainer)
        late = [signum for signum, code in EXIT_CODES.items() if code == self._leave_wanted]
        self._forget()
        for signum in late:
            before: Any = trainer._signal_connector._original_handlers.get(signum)
            if not callable(before) or before is signal.default_int_handler:
                self._leave(signum)  # Lightning's handler would ignore it
            signal.signal(signum, before)
            signal.raise_signal(signum)

    def _detach(self, trainer: Trainer) -> None:
        trainer.callbacks = [c for c in _callbacks(trainer) if not isinstance(c, _EpochStart)]  # type: ignore[attr-defined]
        vars(trainer._signal_connector).pop("register_signal_handlers", None)

    def _install(self, trainer: Trainer) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        requeue = None
        if is_twin(environment, SLURMEnvironment) and environment.auto_requeue:
            requeue = environment.requeue_signal
        for signum in _SIGNALS:
            previous = signal.getsignal(signum)
            if signum == requeue or previous is None:
                continue  # None: set outside Python, cannot be restored
            self._previous[signum] = previous
            signal.signal(signum, self._on_signal)

    def _restore(self) -> None:
        for signum, previous in self._previous.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, previous)
        self._previous.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum not in EXIT_CODES:
            self._save_wanted = True
            return
        asked = self._requests.read(signum)
        if asked == "again" and signum == signal.SIGTERM:
            die_of(signum)
        if asked == "again" or (asked == "first" and self._at_once):
            self._leave(signum, signal.SIGTERM if self._at_once else signal.SIGKILL)
        if asked == "first":
            self._leave_wanted = self._leave_wanted or EXIT_CODES[signal.Signals(signum)]

    def _leave(self, signum: int, to_children: signal.Signals = signal.SIGTERM) -> NoReturn:
        """End this process and those that were launched from it; the launcher's watch would kill it when they end."""
        end_launched(self._children, to_children)
        raise Stopped(EXIT_CODES[signal.Signals(signum)])

    # ---------------------------------------------------------------------------------------------- acting on a flag

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree on the flag across ranks; act if a checkpoint written now resumes exactly."""
        self._agree(trainer)
        if self._agreed and _resumes_exactly_after(trainer, batch_idx):
            self._act(trainer)

    def _before_epoch(self, trainer: Trainer) -> None:
        """Act on a signal from the last step of the previous epoch, its validation, or set-up."""
        self._agree(trainer)
        if not self._agreed:
            return
        # Lightning has counted this epoch as started, with the batches of the previous one: a checkpoint with these
        # counters would skip an epoch. After an exception the counters stay corrected, so that other callbacks that
        # save on the way out are right too.
        loop = trainer.fit_loop
        loop.epoch_loop.batch_progress.reset_on_run()
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            progress.ready -= 1
        self._act(trainer)
        loop.epoch_progress.increment_ready()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on a signal from the very last step; resuming from that file finds nothing left to train."""
        self._agree(trainer)
        if self._agreed:
            self._act(trainer)

    def _agree(self, trainer: Trainer) -> None:
        wish = self._leave_wanted
        if self._save_wanted:
            self._save_wanted = False
            wish = wish or _SAVE
        if trainer.world_size > 1:
            flag = torch.tensor(wish, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            wish = int(flag)
        self._agreed = max(self._agreed, wish)

    def _act(self, trainer: Trainer) -> None:
        code, self._agreed = self._agreed, 0
        path = self._path(trainer)
        keeper = trainer.checkpoint_callback
        if is_twin(keeper, ModelCheckpoint) and keeper.save_last and _is_same(path.parent, keeper.dirpath):
            keeper.last_model_path = str(path)  # otherwise it would write last-v1.ckpt beside it
        if code != _SAVE:
            # Lightning's launcher kills all processes when one exits with a nonzero code
            self._children.clear()
        try:
            trainer.save_checkpoint(path)  # collective; ends with a barrier
            # the command line, which has a run's folder, says the whole command
            how = "" if current_run_folder() else f" Resume with ckpt_path={path}"
            done = f"wrote {path}, exiting with code {code}.{how}"
        except DivergedError as error:
            if code == _SAVE:
                raise
            done = f"exiting with code {code} without a checkpoint. {error}"
        if code == _SAVE:
            rank_zero_info(f"Save requested: wrote {path}, training continues.")
            return
        rank_zero_info(f"Stop requested: {done}")
        self._leave_wanted = 0
        self._requests.forget()  # a launcher may repeat the signal while the loggers close
        raise Preempted(code, path)

    def _path(self, trainer: Trainer) -> Path:
        keeper = trainer.checkpoint_callback
        folder = self.dirpath or getattr(keeper, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        return Path(folder) / self.filename


class _EpochStart(Callback):
    """Runs first among the callbacks; `Preemption` itself runs last."""

    def __init__(self, preemption: Preemption) -> None:
        self._preemption = preemption

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._preemption._before_epoch(trainer)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # Lightning sets it without declaring it


def _is_same(one: Path, two: str | Path | None) -> bool:
    return two is not None and one.resolve() == Path(two).resolve()


def _resumes_exactly_after(trainer: Trainer, batch_idx: int) -> bool:
    done = batch_idx + 1
    if trainer.is_last_batch or done >= trainer.num_training_batches:
        return False  # resuming would skip the end of this epoch and the start of the next
    if done % trainer.accumulate_grad_batches:
        return False  # gradients are not stored
    every = trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(every, int):
        return True
    if trainer.check_val_every_n_epoch is None:
        done = trainer.fit_loop.total_batch_idx + 1
    return done % every != 0  # resuming would skip the validation that is due now
