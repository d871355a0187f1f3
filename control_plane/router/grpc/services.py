"""Everything on the public gRPC port, put together."""

from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from control_plane.router.access.tenants import Keys
from control_plane.router.edge import Edge, RouterState
from control_plane.router.grpc import inference_service, vllm_service
from control_plane.router.grpc.calls import Reception
from control_plane.router.grpc.health import HEALTH_NAME, ReadinessHealth
from control_plane.router.grpc.inference_service import InferenceService
from control_plane.router.grpc.messages import CarefulServer
from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.grpc.vllm_service import VllmEngineService
from control_plane.router.validation.validator import Validator
from control_plane.wire import inference_pb2_grpc

NAMES = (inference_service.SERVICE_NAME, vllm_service.SERVICE_NAME)


def add_services(
    server: grpc.aio.Server,
    *,
    edge: Edge,
    validator: Validator,
    state: RouterState,
    wall_s: Callable[[], float],
    keys: Keys | None = None,
    facts: ServerFacts | None = None,
) -> ReadinessHealth:
    """The health is the caller's to refresh while it is watched. No `keys`: whoever reaches the port may ask."""
    reception = Reception(edge, validator, keys or Keys())
    facts = facts or ServerFacts()
    health = ReadinessHealth(state, NAMES)
    careful = CarefulServer(server)
    inference_pb2_grpc.add_InferenceServicer_to_server(  # type: ignore[no-untyped-call]
        InferenceService(reception, edge, state, facts), careful
    )
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(
        VllmEngineService(reception, edge, state, facts, wall_s), careful
    )
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*NAMES, HEALTH_NAME, reflection.SERVICE_NAME), server)
    return health
