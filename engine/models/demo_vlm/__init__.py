"""The demo vision-language model: eyes for the default model, put together with it on the machine that serves it.

Packaged here are a vision tower and a projector (`weights.safetensors`), trained in this repository by `bench.demo_vlm`
for the frozen default model; its own weights are not touched, and not packaged twice.
"""
