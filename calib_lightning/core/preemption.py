"""Save and leave in order when a scheduler or a user asks for the machine back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1"))  # Windows has no SIGUSR1
_LEAVE = {signal.SIGTERM: 143, signal.SIGINT: 130}
_SAVE = 1  # below every exit code, so the maximum over ranks is the strongest wish
_SAME_REQUEST = 1.0  # seconds: a launcher forwards, within milliseconds, what the whole process group has got already


class Preempted(SystemExit):
    """The run was asked to leave, has saved a checkpoint and ends the process with ``code``.

    It is a `SystemExit`, so a script that does not catch it ends quietly with the right exit code.

    Attributes:
        code: 143 after SIGTERM, 130 after SIGINT.
        path: The checkpoint to resume from.
    """

    def __init__(self, code: int, path: Path) -> None:
        super().__init__(code)
        self.path = path


class Preemption(Callback):
    """Turn SIGTERM, SIGINT and SIGUSR1 into a checkpoint from which ``fit`` resumes exactly.

    SIGTERM and SIGINT (Ctrl-C): save, then leave with exit code 143 or 130. SIGUSR1: save and go on. During ``fit`` the
    handler replaces Lightning's, which calls a collective operation inside the signal handler and can hang two ranks
    forever. Ours only sets a flag. After every step the ranks agree on the flag by one all-reduce, so a signal to a
    single rank is enough; all save together and leave together. The handlers that were there before are put back when
    ``fit`` ends.

    A signal is acted on at the end of the current training step, unless a file written there would not resume exactly:
    inside a gradient-accumulation window and before a validation run it waits for the next step, after the last step
    of an epoch for the start of the next epoch or the end of training. A signal that comes during set-up or validation
    waits likewise, so keep the scheduler's grace period longer than one validation run. The same signal once more,
    at least a second later, ends the process at once without a checkpoint.

    The callback moves itself to the end of the trainer's list, so the file holds what the others did at the end of the
    step. A module's own ``on_train_batch_end`` runs after all callbacks: what it changes in that step is lost.

    Exactness needs randomness that is a function of the step (`StepSeed`) and a training loader with ``state_dict`` and
    ``load_state_dict``. Under SLURM with Lightning's automatic requeue the requeue signal stays Lightning's.

    Args:
        dirpath: Folder of the file; ``None`` means that of the trainer's first ``ModelCheckpoint``, else
            ``checkpoints`` in ``trainer.default_root_dir``.
        filename: Name of the file, which each save replaces. With the default, in the folder of ``ModelCheckpoint``,
            both ``ckpt_path="last"`` and the path itself resume the run: nobody has to know that it was interrupted.

    Raises:
        ValueError: If ``filename`` is a path or does not end in ``.ckpt``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Preemption()], logger=False)
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = "last.ckpt") -> None:
        if Path(filename).name != filename or not filename.endswith(".ckpt"):
            raise ValueError(f"filename is {filename!r}; give a plain file name that ends in '.ckpt', and use dirpath")
        self.dirpath = dirpath
        self.filename = filename
        self._previous: dict[signal.Signals, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._save_wanted = False
        self._leave_wanted = 0
        self._first_seen: dict[int, float] = {}
        self._agreed = 0  # 0, _SAVE or an exit code: the same on all ranks

    # ------------------------------------------------------------------------------------------------- the handlers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the handlers, and see to it that they come out on top of Lightning's."""
        if stage != "fit":
            return
        # What other callbacks do at the end of a step belongs into the file, what they do at the start of an epoch
        # does not: the resumed run calls them again.
        others = [callback for callback in _callbacks(trainer) if callback is not self]
        vars(trainer)["callbacks"] = [_EpochStart(self), *others, self]
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Preemption does nothing: Python handles signals in the main thread only, run fit there.")
            return
        self._forget()
        self._install(trainer)

        # Lightning registers its handlers after the last hook before the loops start, and the loops may start many
        # worker processes before they call a hook again: no hook is near enough.
        connector = trainer._signal_connector
        register = connector.register_signal_handlers

        def register_below() -> None:
            self._restore()  # Lightning must remember the handlers from before us: it puts them back at the end
            register()
            self._install(trainer)

        vars(connector)["register_signal_handlers"] = register_below

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the old handlers back, except on our own way out: there Lightning does it, after the loggers closed."""
        if not isinstance(exception, Preempted):
            self._restore()
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the old handlers back and hand them a signal that came too late for us."""
        if stage != "fit":
            return
        self._restore()
        self._detach(trainer)
        late = [signum for signum, code in _LEAVE.items() if code == self._leave_wanted]
        self._forget()
        for signum in late:
            signal.raise_signal(signum)

    def _detach(self, trainer: Trainer) -> None:
        vars(trainer)["callbacks"] = [c for c in _callbacks(trainer) if not isinstance(c, _EpochStart)]
        vars(trainer._signal_connector).pop("register_signal_handlers", None)

    def _install(self, trainer: Trainer) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        requeue = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            requeue = environment.requeue_signal
        for signum in _SIGNALS:
            previous = signal.getsignal(signum)
            if signum == requeue or previous is None:
                continue  # None: set outside Python, which could not put it back
            self._previous[signum] = previous
            signal.signal(signum, self._on_signal)

    def _restore(self) -> None:
        for signum, previous in self._previous.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, previous)
        self._previous.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child, a loader's worker say, has inherited the handler, not the duty
            if signum == signal.SIGTERM:
                _die_of(signum)
            return
        if signum not in _LEAVE:
            self._save_wanted = True
            return
        now = time.monotonic()
        if now - self._first_seen.setdefault(signum, now) >= _SAME_REQUEST:
            _die_of(signum)
        self._leave_wanted = self._leave_wanted or _LEAVE[signal.Signals(signum)]

    # ---------------------------------------------------------------------------------------------- acting on a flag

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree on the flag; act if a file written here resumes exactly."""
        self._agree(trainer)
        if self._agreed and _resumes_exactly_after(trainer, batch_idx):
            self._act(trainer)

    def _before_epoch(self, trainer: Trainer) -> None:
        """Act on what came during the last step of the epoch before, its validation, or set-up."""
        self._agree(trainer)
        if not self._agreed:
            return
        # Lightning counts this epoch as begun and the batches of the one before as its own: a file that says so
        # resumes behind an epoch that was never trained. Leaving by the exception keeps the counters down, which makes
        # right what another callback may save on the way out.
        loop = trainer.fit_loop
        loop.epoch_loop.batch_progress.reset_on_run()
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            progress.ready -= 1
        self._act(trainer)
        loop.epoch_progress.increment_ready()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on what came during the last step of all; resuming from that file finds nothing left to train."""
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
        if isinstance(keeper, ModelCheckpoint) and keeper.save_last and _is_same(path.parent, keeper.dirpath):
            keeper.last_model_path = str(path)  # else it would write last-v1.ckpt beside a file that it does not know
        if code != _SAVE:
            # Lightning's launcher watches its children and kills everything when one leaves with a code other than 0
            getattr(trainer.strategy.launcher, "procs", []).clear()
        trainer.save_checkpoint(path)  # on all ranks; ends with a barrier
        if code == _SAVE:
            rank_zero_info(f"Asked to save: wrote {path}, training goes on.")
            return
        rank_zero_info(f"Asked to stop: wrote {path}, leaving with exit code {code}. Resume with ckpt_path={path}")
        self._leave_wanted = 0
        self._first_seen.clear()  # a launcher may signal once more while the loggers close
        raise Preempted(code, path)

    def _path(self, trainer: Trainer) -> Path:
        keeper = trainer.checkpoint_callback
        folder = self.dirpath or getattr(keeper, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        return Path(folder) / self.filename


class _EpochStart(Callback):
    """First of all callbacks, where `Preemption` itself is the last."""

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
        return False  # a resumed run would skip the end of this epoch and the start of the next
    if done % trainer.accumulate_grad_batches:
        return False  # gradients are not stored
    every = trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(every, int):
        return True
    if trainer.check_val_every_n_epoch is None:
        done = trainer.fit_loop.total_batch_idx + 1
    return done % every != 0  # a resumed run would skip the validation that is due now


def _die_of(signum: int) -> None:
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    signal.raise_signal(signum)
