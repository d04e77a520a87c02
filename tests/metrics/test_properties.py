"""Any sequence of batches, copies, merges, resets and errors leaves what one pass over the same rows gives."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from calib_lightning.metrics import FULL, EvaluationState, devices

CLASSES = 4
COPIES = {"pickle": lambda metric: pickle.loads(pickle.dumps(metric)), "deepcopy": copy.deepcopy}
BROKEN = {
    "nan": (0, torch.nan, 0, None),
    "inf": (0, torch.inf, 0, None),
    "label": (0, 0.0, CLASSES, None),
    "classes": (1, 0.0, 0, "classes but earlier"),
    "no columns": (-CLASSES, 0.0, 0, "shape"),
}


@st.composite
def batches(draw, least=0):
    """Up to six rows of four logits, many of them tied."""
    rows = draw(st.integers(least, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    logits = 3 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
    logits = (logits.round() if draw(st.booleans()) else logits).to(dtype)
    return logits, torch.randint(CLASSES, (rows,), generator=generator)


class Histories(RuleBasedStateMachine):
    """States next to the rows that they should know."""

    options: dict[str, object]
    states = Bundle("states")

    def __init__(self):
        super().__init__()
        self.all = []

    def one_pass(self, rows):
        """What a fresh state says: one batch for each dtype, as rows cannot be joined without a change of it."""
        whole = EvaluationState(FULL, **self.options)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            of_dtype = [batch for batch in rows if batch[0].dtype == dtype]
            if of_dtype:
                whole.update(*(torch.cat(parts) for parts in zip(*of_dtype, strict=True)))
        return {key: value.item() for key, value in whole.compute().items()}

    def check(self, values, rows):
        found = {key: value.item() for key, value in values.items()}
        assert found == pytest.approx(self.one_pass(rows), rel=1e-9, abs=1e-12, nan_ok=True)

    def keep(self, metric, rows):
        self.all.append((metric, rows))
        return metric, rows

    @initialize(target=states)
    def first(self):
        return self.keep(EvaluationState(FULL, **self.options), [])

    @rule(target=states)
    def new(self):
        return self.keep(EvaluationState(FULL, **self.options), [])

    @rule(state=states, batch=batches())
    def update(self, state, batch):
        state[0].update(*batch)
        state[1].append(batch)

    @rule(state=states, batch=batches())
    def forward(self, state, batch):
        self.check(state[0](*batch), [batch])
        state[1].append(batch)

    @rule(target=states, state=states, how=st.sampled_from(sorted(COPIES)))
    def clone(self, state, how):
        return self.keep(COPIES[how](state[0]), list(state[1]))

    @rule(into=states, state=states, plain=st.booleans())
    def merge(self, into, state, plain):
        if into[0] is state[0]:
            return
        into[0].merge_state(dict(state[0].metric_state) if plain else state[0])
        into[1].extend(state[1])

    @rule(state=states)
    def reset(self, state):
        state[0].reset()
        state[1].clear()
        assert int(state[0].count) == 0
        assert all(len(state[0].rows_of(name)) == 0 for name in state[0].lists)

    @rule(state=states, batch=batches(least=1), case=st.sampled_from(sorted(BROKEN)), forward=st.booleans())
    def error(self, state, batch, case, forward):
        columns, value, label, message = BROKEN[case]
        if case == "classes" and not state[1]:
            return
        logits, labels = batch[0].clone(), batch[1].clone()
        logits[0, 0] += value
        labels[0] += label
        logits = torch.cat([logits, logits[:, :columns]], dim=1) if columns >= 0 else logits[:, :0]
        with pytest.raises(ValueError, match=message):
            (state[0] if forward else state[0].update)(logits, labels)

    @rule(state=states, batch=batches(least=1))
    def error_found_by_compute(self, state, batch):
        batch[0][0, 1] = torch.nan
        with (
            mock.patch.object(devices, "checks_at_once", return_value=False),
            pytest.raises(ValueError, match="1 with invalid logits"),
        ):
            state[0](*batch)

    @rule(state=states)
    def compute(self, state):
        self.check(state[0].compute(), state[1])
        assert state[0].settings["rows"] == sum(len(labels) for _, labels in state[1])

    def teardown(self):
        for metric, rows in self.all:
            self.check(metric.compute(), rows)


SETTINGS = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def case_of(**options):
    case = type("Histories", (Histories,), {"options": options}).TestCase
    case.settings = SETTINGS
    expected = ("ignore:.*nan", "ignore:ovo_auroc", "ignore:The ``compute`` method", "ignore:.*are so close together")
    return pytest.mark.filterwarnings(*expected)(case)


TestExact = case_of()
TestDetails = case_of(details=True)
TestHistogram = case_of(rank_bins=1024)


def test_merging_remembers_the_number_of_classes():
    def fed(classes):
        state = EvaluationState(["accuracy"])
        state.update(torch.eye(classes), torch.arange(classes))
        return state

    state = EvaluationState(["accuracy"])
    state.merge_state(fed(4))
    with pytest.raises(ValueError, match="logits have 5 classes but earlier batches had 4"):
        state.update(torch.eye(5), torch.arange(5))
    with pytest.raises(ValueError, match="classes of the other state is"):
        state.merge_state(fed(5))
    assert state.settings["rows"] == 4


@pytest.mark.parametrize("options", [{"n_bins": 1}, {"rank_bins": 64}, {"input": "probs"}])
def test_states_of_other_settings_are_not_merged(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} of the other state is {value!r}; it must be "):
        EvaluationState().merge_state(EvaluationState(**options))


def test_a_merge_is_seen_after_a_result_was_read():
    state, other = EvaluationState(["accuracy"]), EvaluationState(["accuracy"])
    state.update(torch.eye(3), torch.arange(3))
    other.update(torch.eye(3), (torch.arange(3) + 1) % 3)
    assert state.compute()["accuracy"].item() == 1.0
    state.merge_state(other)
    assert state.compute()["accuracy"].item() == 0.5
