"""KV transfer (floor 2): codecs, frames, the Source and Target machines, and the transports that carry them.

It moves computed KV between workers' arenas. It neither computes KV (`engine`) nor knows requests (`control_plane`),
and only `transports.grpc` imports grpc.
"""
