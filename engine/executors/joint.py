"""JointExecutor: one worker's language model and encoder behind one door. It computes nothing itself."""

from engine.commands import EncodeOutput, EncodePlan, StepOutput, StepPlan
from engine.executors import Encoder, Executor, LayersComputed


class JointExecutor:
    """Runs the steps of a `WorkerEngine`, each by whom it is for. A worker may have only one of the two."""

    def __init__(self, language: Executor | None, encoder: Encoder | None) -> None:
        self._language = language
        self._encoder = encoder

    def execute(self, plan: StepPlan | EncodePlan, on_layers: LayersComputed) -> StepOutput | EncodeOutput:
        if isinstance(plan, EncodePlan):
            if self._encoder is None:
                raise RuntimeError("this worker has no encoder")
            return self._encoder.encode(plan)
        if self._language is None:
            raise RuntimeError("this worker has no language model")
        return self._language.execute(plan, on_layers)
