"""Quality: nothing lost is nothing, and what is lost is what the definitions say."""

from math import exp

import numpy as np
import pytest
import torch

from engine.capture import Subject, Window
from engine.quality import Judge, Loss, mean_kl, ppl_change
from tests.engine.tiny_models import prompt_of, tiny_model

WINDOW = Window(tuple(prompt_of(30)), tuple(prompt_of(10, salt=2)))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(tiny_model())


def test_kv_as_it_was_loses_nothing(subject: Subject) -> None:
    kv_LHPTD = subject.kv(WINDOW.prefix, "bfloat16")
    judge = Judge(subject, WINDOW, kv_LHPTD)
    loss, none = judge.loss(kv_LHPTD.copy()), judge.no_loss()
    assert loss.kl == pytest.approx(0, abs=1e-6) and none.kl == 0
    assert loss.nats_after == pytest.approx(loss.nats_before, abs=1e-6)
    assert none.nats_after == none.nats_before == loss.nats_before


def test_kl_and_perplexity_are_what_torch_says_of_the_two_distributions(subject: Subject) -> None:
    kv_LHPTD = subject.kv(WINDOW.prefix, "bfloat16")
    lossy_LHPTD = kv_LHPTD * np.float32(0.7)
    before_SV, after_SV = (subject.log_probs(kv, WINDOW.scored) for kv in (kv_LHPTD, lossy_LHPTD))
    loss = Judge(subject, WINDOW, kv_LHPTD).loss(lossy_LHPTD)
    kl = torch.nn.functional.kl_div(after_SV, before_SV, log_target=True, reduction="batchmean")
    nats = torch.nn.functional.nll_loss(after_SV[:-1], torch.tensor(WINDOW.scored[1:]))
    assert loss.kl == pytest.approx(float(kl), rel=1e-4) and loss.kl > 0.01
    assert loss.nats_after == pytest.approx(float(nats), rel=1e-5)


def test_windows_are_averaged_in_nats() -> None:
    losses = [Loss(0.1, 2.0, 2.2), Loss(0.3, 1.0, 1.0)]
    assert mean_kl(losses) == pytest.approx(0.2)
    assert ppl_change(losses) == pytest.approx(exp(0.1) - 1)
