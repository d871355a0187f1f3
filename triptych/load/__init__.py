"""`triptych bench serve`: offers load to any server with OpenAI's completions or chat, and says how it was served.

    options      what a person asks for            events   (triptych.events) the stream's lines
    arrivals     seed -> when to send              client   one request -> one sample
    prompts      seed -> what to send              sender   open and closed loop: requests in, samples out
    samples      what is kept of many requests     figures  samples -> numbers
    measurement  all of it together                report   figures -> terminal, JSON
    command      `run`: a terminal around it

The figures carry the names and the meaning that `vllm bench serve` gave them, so that people can compare. One thing
differs: in an open loop a request's time runs from when it was *meant* to be sent. A sender that lags behind a slow
server would otherwise leave out exactly the waiting that it is there to measure (coordinated omission).
"""
