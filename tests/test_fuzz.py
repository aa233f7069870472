"""A few hundred odd inputs of each kind: nothing but results and documented errors. `benchmarks/fuzz.py` tries many more."""

import pytest
from fuzzing import TRIALS
from hypothesis import HealthCheck, given, settings

settings.register_profile(
    "ci",
    derandomize=True,  # the same examples each time
    database=None,
    deadline=10_000,  # ms
    suppress_health_check=list(HealthCheck),  # inputs are large, and some of them take long to make
)
NUM_INPUTS = {"processor": 500, "config": 300, "converter": 100}


@pytest.mark.parametrize("kind", TRIALS)
def test_odd_inputs_give_results_or_documented_errors(kind):
    strategy, attempt = TRIALS[kind]

    @settings(settings.get_profile("ci"), max_examples=NUM_INPUTS[kind])
    @given(strategy)
    def attempted(given_input):
        attempt(given_input)

    attempted()
