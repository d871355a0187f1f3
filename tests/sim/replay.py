"""Replay one seed: `python -m tests.sim.replay SEED [--log]`. Prints the scenario, the figures and what went wrong."""

import sys
from pprint import pprint

from tests.sim.simulation import Simulation, draw_scenario


def main(arguments: list[str]) -> int:
    seed, log = int(arguments[0]), "--log" in arguments
    scenario = draw_scenario(seed)
    pprint(scenario.shape)
    pprint(scenario.plan)
    simulation = Simulation(scenario, recording=log)
    try:
        simulation.run()
    finally:
        print(*simulation.world.log, sep="\n")
        pprint(dict(simulation.report().figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
