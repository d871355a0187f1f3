"""Which codecs a worker has, as its options name them. For processes that may read a profile's tables; no torch.

--profile FILE     that one; it must be of the worker's model
nothing            the one that comes with the package, if the model has one
--codec NAME       must be among what then is there: a deployment that asks for what nobody has is a mistake at start
"""

from control_plane.options import EngineOptions, OptionError
from engine.base import limits
from engine.base.errors import InvalidArgument
from engine.kv.schema import CacheSchema
from kv_transfer.codecs import RAW, CodecSet, codecs
from kv_transfer.offers import AUTO, offers_of
from kv_transfer.profile import Profile, load
from kv_transfer.profiles import packaged


def choose_codecs(options: EngineOptions, schema: CacheSchema) -> CodecSet:
    """Expands tables: not for an event loop. Raises `OptionError`."""
    profile = choose_profile(options, schema)
    try:
        return CodecSet(schema.kv, profile)
    except InvalidArgument as error:
        raise OptionError("profile", error.message) from error


def choose_profile(options: EngineOptions, schema: CacheSchema) -> Profile | None:
    """Reads files. Raises `OptionError` for a profile of another model, or without the codec that was asked for."""
    profile = packaged(schema.model) if options.profile is None else _load(options, schema)
    if _needs_tables(options.codec) and (profile is None or options.codec not in profile.tables):
        raise OptionError(
            "codec",
            f"'{options.codec}' needs a profile of this model that has it: make one with"
            f" `triptych profile {options.model}` and name it with --profile",
        )
    return profile


def travels_raw(options: EngineOptions, chosen: CodecSet) -> bool:
    """Whether the deployment asks for a codec, and its KV goes raw all the same: nobody has a level for its budget."""
    if options.codec in (RAW, AUTO):
        return False
    offer = next((offer for offer in offers_of(chosen) if offer.codec == options.codec), None)
    if offer is None:
        return True  # it does not take numbers of this dtype
    if not offer.costs:
        return options.kl_budget is not None
    budget = limits.KL_BUDGET if options.kl_budget is None else options.kl_budget
    return min(cost.kl for cost in offer.costs) > budget


def _load(options: EngineOptions, schema: CacheSchema) -> Profile:
    assert options.profile is not None
    try:
        profile = load(options.profile)
    except InvalidArgument as error:
        raise OptionError("profile", error.message.removeprefix("profile ")) from error
    if profile.model != schema.model:
        raise OptionError(
            "profile", f"{options.profile} is of the model {profile.model}, and '{options.model}' is {schema.model}"
        )
    return profile


def _needs_tables(codec: str) -> bool:
    return codec != AUTO and codecs.get(codec).profiled
