"""Every limit of the system in one table: queues, messages, waits, retries. Nothing else may hard-code one.

A limit without a reason is a bug report: each line says what breaks when it is exceeded. Values that an operator
may want to change are repeated as fields of a component's `Config`, whose default is the constant here.
"""

from typing import Final

# -- links ---------------------------------------------------------------------------------------------------------
KEEPALIVE_INTERVAL_MS: Final = 1_000  # an idle link says "still here" this often
LINK_SILENCE_MS: Final = 3_000  # three missed keep-alives: the peer is frozen, gone, or cut off
DIAL_TIMEOUT_MS: Final = 3_000
REDIAL_DELAY_MS: Final = 250  # between attempts to reach a peer that should be there
MESSAGE_BYTES_MAX: Final = 4 << 20  # one control message; a 32k-token prompt is 128 KiB
LINK_QUEUE_MESSAGES_MAX: Final = 4_096  # unsent messages before a slow reader counts as a lost link

# -- KV transfer ---------------------------------------------------------------------------------------------------
FRAME_PAYLOAD_BYTES_MAX: Final = 2 << 20  # one frame: a layer group of a 512-token chunk in bf16; half a gRPC message
FRAME_WINDOW: Final = 8  # frames in flight per transfer; bounds both ends' memory
FRAME_RESENDS_MAX: Final = 3  # a range refused this often means the path corrupts; give the transfer up
FRAME_RESEND_AFTER_MS: Final = 1_000  # no answer for a frame on a live link
TRANSFERS_REMEMBERED: Final = 4_096  # finished transfers kept so that a repeated END is answered COMMITTED
KL_BUDGET: Final = 0.01  # nats per token that a request's KV may lose on its way unless it says so (DESIGN 8)
KL_BUDGET_MAX: Final = 1.0  # far beyond this the answer is another model's
CODEC_OFFERS_MAX: Final = 32  # codecs of one worker; they are in every copy of the table of workers
CODEC_LEVELS_MAX: Final = 32  # measured levels of one codec, likewise: 32 bytes each
CODEC_JOBS_MAX: Final = 16  # encode and decode jobs running or queued in one worker
CODEC_THREADS: Final = 1  # more would fight the engine for memory bandwidth on small machines

# -- requests ------------------------------------------------------------------------------------------------------
PROMPT_TOKENS_MAX: Final = 131_072
OUTPUT_TOKENS_MAX: Final = 131_072
OUTPUT_TOKENS_DEFAULT: Final = 16  # OpenAI's completions default
STOP_TOKEN_IDS_MAX: Final = 64
STOP_STRINGS_MAX: Final = 16  # each is sought in every piece of text
STOP_STRING_CHARACTERS_MAX: Final = 256  # text that may begin a stop string is held back from the client
STOP_CHARACTERS_MAX: Final = 2_048  # of all stop strings together: their automaton is built on the loop, in 0.8 ms
CHOICES_MAX: Final = 16  # `n`: each is a decoding sequence of its own
TOP_K_MAX: Final = 1 << 20
LOGPROBS_MAX: Final = 20  # vLLM's limit; each costs 12 bytes per token on two links
REPETITION_PENALTY_MAX: Final = 100.0
PENALTY_ABS_MAX: Final = 2.0  # OpenAI's range of the presence and frequency penalties
LOGIT_BIAS_MAX: Final = 1_024
ALLOWED_TOKEN_IDS_MAX: Final = 1_024
BAD_WORDS_MAX: Final = 128
BAD_WORDS_TOKENS_MAX: Final = 1_024  # all together; each is compared with the end of the output in every step
PRIORITY_MAX: Final = 1 << 20  # of either sign; lower runs earlier
CACHE_SALT_CHARACTERS_MAX: Final = 128  # it travels with every prefill and reservation
CONSTRAINT_BYTES_MAX: Final = 64 << 10  # a JSON schema; a hostile one must not cost seconds before it is refused
# What one constraint may cost, in the units of llguidance's compiler and matcher: measured on one slow core, the worst
# of 60 hostile ones cost 0.3 s in all, and no step of a sequence that went on cost more than 50 ms.
CONSTRAINT_SYMBOLS_MAX: Final = 10_000  # grammar productions: a schema of about 1,000 properties
CONSTRAINT_COMPILE_FUEL: Final = 250_000  # regex nodes looked at before the first token
CONSTRAINT_STEP_FUEL: Final = 50_000  # regex nodes built for one token: about 4 ms
CONSTRAINT_STEP_ITEMS_MAX: Final = 20_000  # parser items for one token
CONSTRAINT_ROW_ITEMS_MAX: Final = 2_000  # parser items for one byte: about 500 optional properties side by side
CONSTRAINT_LEXER_STATES_MAX: Final = 8_000  # in a lexer's life, 1 to 2 KiB each
CONSTRAINT_MEMBERS_MAX: Final = 2_000  # of one JSON object in a schema: optional properties cost their square
CONSTRAINT_MULTIPLE_MAX: Final = 20_000  # least common multiple of all `multipleOf`: one automaton state for each unit
BODY_BYTES_MAX: Final = 4 << 20
IMAGES_MAX: Final = 16  # of one request, unless `--limit-mm-per-prompt` says less or more
IMAGES_CEILING: Final = 256  # that any deployment may allow
IMAGE_FILE_BYTES_MAX: Final = 20 << 20  # of one image as it comes: OpenAI's limit, and vLLM's clients'
IMAGE_PIXELS_MAX: Final = 16 << 20  # of one image, decoded: 48 MiB; a phone's camera makes 12 million
IMAGE_SIDE_MAX: Final = 16_384  # longer ones are bombs or panoramas
IMAGE_BODY_BYTES_MAX: Final = 64 << 20  # of a body that holds images as data URLs
IMAGE_FEATURES_MAX: Final = 16_384  # placeholders of one image
IMAGE_RUNS_MAX: Final = 256  # stretches of placeholders of one image: one for each tile
PIXELS_PIECE_BYTES_MAX: Final = 256 << 10  # of one message: copying it takes 0.1 ms of the loop
PIXELS_ASKED_BYTES_MAX: Final = 1 << 20  # of one answer to one question: four messages
PIXELS_AHEAD_BYTES: Final = 64 << 20  # asked for and not yet through the tower, at one worker; one image always may
IMAGES_HELD_BYTES_MAX: Final = 1 << 30  # pixels of requests that have not ended, at one router
MEDIA_DECODE_MS: Final = 5_000  # of CPU, for one image
MEDIA_CHILD_BYTES_MAX: Final = 1 << 30  # address space of the process that decodes
MEDIA_FETCH_MS: Final = 5_000  # of one remote image, all in all
MEDIA_DECODES_WAITING_MAX: Final = 64  # images queued for the decoding processes
ENCODE_AHEAD_TOKENS: Final = 4_096  # image tokens given to one encode worker and not yet encoded: a batch, and the next
ENCODE_IMAGE_US: Final = 300_000  # of one image, until its encoder has said: a large tower on a few cores
ENCODE_IMAGE_TOKENS: Final = 576  # of that image: LLaVA-1.5's 24 x 24
ENCODE_STEP_US: Final = 50_000  # of a full step of prompt tokens ahead of it, likewise
ENCODE_AT_PREFILL_FRACTION: Final = 0.5  # beside encoders a prefill worker encodes if done in this part of their time
TOWER_LOAD_US: Final = 2_000_000  # a prefill worker's first image: some GB from the page cache, and their first forward
ENCODE_BATCH_IMAGES: Final = 8  # through the tower together, in an encode worker
ENCODE_BATCH_TOKENS: Final = 4_096  # likewise; one image always may
PROMPTS_MAX: Final = 128  # in one completions request; lm-eval and vLLM's clients send batches
REQUEST_CHOICES_MAX: Final = 256  # prompts times `n`: all of them are opened at once, or none
MESSAGES_MAX: Final = 1_024  # of one conversation
MESSAGE_PARTS_MAX: Final = 128  # pieces of one message's content; all messages together have at most MESSAGES_MAX
MESSAGE_NAME_CHARACTERS_MAX: Final = 64  # OpenAI's limit; templates print it
TEMPLATE_VARIABLES_MAX: Final = 32  # `chat_template_kwargs`: known templates read two or three
TEMPLATE_VARIABLE_CHARACTERS_MAX: Final = 1_024  # of one of them
CHAT_TEMPLATE_BYTES_MAX: Final = 256 << 10  # the longest of known models' are 30 KiB; compiled at start
TOKENIZER_CONFIG_BYTES_MAX: Final = 4 << 20  # tokenizer_config.json: 300 KiB where it lists thousands of added tokens
CHAT_CHARACTERS_MAX: Final = 1 << 20  # of one conversation, rendered: about 250,000 tokens of English
CHAT_RENDER_MS: Final = 1_000  # a template that takes longer is pathological
API_KEYS_MAX: Final = 4_096  # each is compared with every request's
API_KEY_FILE_BYTES_MAX: Final = 1 << 20
SLO_MS_MAX: Final = 600_000
TEMPERATURE_MAX: Final = 100.0
SEED_MAX: Final = (1 << 63) - 1
REQUEST_ID_CHARACTERS_MAX: Final = 128
ROUTER_REQUESTS_MAX: Final = 1_024  # accepted and unfinished; one more is answered 429
ROUTER_QUEUED_TOKENS_MAX: Final = 1 << 20  # prompt tokens accepted and not yet prefilled
RETRY_AFTER_MS: Final = 1_000
REQUEST_DEADLINE_MS: Final = 120_000
REQUEST_DEADLINE_MS_MAX: Final = 600_000
QUEUE_TIMEOUT_MS: Final = 30_000  # in the router's queue; whoever would wait longer is told at once to come back later
SERVICE_TIME_DEVIATIONS: Final = 2  # mean deviations above the mean: about one first token in twenty takes longer
NO_PROGRESS_MS: Final = 30_000  # a placement that computes or sends and says nothing is given up, and another one tried
NO_PROGRESS_TOKEN_MS: Final = 20  # more for each prompt token that it must compute before it can say anything
WATCHED_MIN: Final = 256  # deadlines kept before those of requests that are over are looked for and dropped
SHARE_ALPHA: Final = 4  # one tenant holds at most 4/5 of what can be shared out, two 4/9 each: the rest is for others
FAIR_CREDIT_TOKENS: Final = 16_384  # by which one that comes back goes before others: a burst of eight long prompts
OUTPUT_TOKEN_WEIGHT: Final = 2  # of an output token in prompt tokens (VTC, section 3.1): it holds memory for a step
PLACEMENT_TRIES_MAX: Final = 8  # waiting requests looked at for one free place; more would grow with the queue
DRAIN_RATE_MEMORY_MS: Final = 10_000  # how far back the measured rate of the queue looks: a few long prompts
DRAIN_RATE_MEASURED_MS: Final = 1_000  # of waiting, before a rate is believed: nobody is refused for one slow prompt
DRAIN_RATE_TOKENS_MIN: Final = 512  # and on so many tokens: one full step of one worker
WORKER_WAIT_MS: Final = 10_000  # how long a request waits for a worker of a role to appear
ATTEMPTS_MAX: Final = 8  # placements of one request; a poison request must not visit every worker
ENGINE_FAILURES_MAX: Final = 2  # one may be the engine's fault; a second is the request's, and finds no third victim
RESERVE_RETRY_MS: Final = 50  # every decode worker said FULL: ask again this much later
PREFIX_INDEX_BLOCKS_MAX: Final = 1 << 16  # hashes that a router remembers of one worker: about 8 MiB
DECODE_LOAD_TOKENS: Final = 256  # a running sequence slows its neighbours about as much as sending KV of so many tokens

# -- workers and leases --------------------------------------------------------------------------------------------
LEASE_MS: Final = 5_000
HEARTBEAT_MS: Final = 1_000
WORKERS_MAX: Final = 1_024
WORKER_ATTEMPTS_MAX: Final = 4_096  # attempts a worker holds a record for
UNBOUND_PREFILLS_MAX: Final = 2  # prefills holding units without a target (DESIGN 1: no deadlock, no starvation)
GROWTH_RESERVE_TOKENS: Final = 64  # a decode reservation includes room for this many tokens of growth
DRAIN_TIMEOUT_MS: Final = 30_000

# -- engine --------------------------------------------------------------------------------------------------------
BLOCK_SIZE_TOKENS: Final = 16
STEP_TOKENS_MAX: Final = 512  # token budget of one step (chunked prefill)
STEP_SEQUENCES_MAX: Final = 256
MATCHERS_MAX: Final = STEP_SEQUENCES_MAX  # live matchers of one worker; one too few costs a replay, no more
MATCHER_SPARES_MAX: Final = 64  # compiled constraints that the next sequence starts from
STEP_TILE_TOKENS: Final = 32  # budgets chosen from measured times are multiples of it: rows that a GEMM does at once
STEP_TIME_FILE_BYTES_MAX: Final = 64 << 10  # a fitted model is 1 KiB; anybody may have put something else there
STEP_TIME_COEFFICIENT_US_MAX: Final = 1e9  # a quarter of an hour for one token is no measurement
PREFILL_AHEAD_TOKENS: Final = 2 * STEP_TOKENS_MAX  # behind a worker's running prompt: one step, one for the way there
NEAR_TURN_TOKENS: Final = 2 * STEP_TOKENS_MAX  # admitted prompt tokens ahead of the computed ones: one step, one spare
PASSES_MAX: Final = 8  # after this many overtakings a prompt that does not fit stops all behind it
ADMISSION_TRIES_MAX: Final = 32  # prompts found not to fit, in one step; planning must not grow with the queue
LAYERS_PER_GROUP: Final = 5  # layers computed between two "KV is ready" announcements
ATTENTION_SCRATCH_BYTES_MAX: Final = 8 << 20  # one mask, or the spelled-out scores of one piece of a chunk
VERIFY_WINDOW_TOKENS_MAX: Final = 512  # the self-check runs a prompt longer than the window, at load

# -- the router's edge ---------------------------------------------------------------------------------------------
HTTP_CONNECTIONS_MAX: Final = 4 * ROUTER_REQUESTS_MAX  # open at once on one port; each holds a descriptor and buffers
HTTP_BACKLOG: Final = 2_048  # completed handshakes that the kernel keeps while the loop is busy; more are retried
HTTP_HEAD_BYTES_MAX: Final = 32 << 10  # request line and headers; no client of ours needs 8 KiB
HTTP_HEAD_MS: Final = 10_000  # from connecting, or from a request's first byte, to the end of its headers
HTTP_IDLE_MS: Final = 30_000  # between two requests of one connection; then it makes room for another client
HTTP_LINGER_MS: Final = 5_000  # after the last byte was handed over, for a client to take it; then it is cut off
HTTP_STALL_MS: Final = 60_000  # what was sent stays unread for so long: nobody reads any more
HTTP_STOP_MS: Final = 5_000  # after `stop`, for responses under way; draining comes before it (DRAIN_TIMEOUT_MS)
HTTP_PIPELINED_MAX: Final = 8  # requests sent ahead of their answers: a read of 256 KiB could hold ten thousand
ABORT_BYTES_MAX: Final = 64 << 10  # of a list of ids to end: more ids than there can be requests
OPEN_FILES_WANTED: Final = 65_536  # soft limit asked for at start: the usual 1024 is fewer than HTTP_CONNECTIONS_MAX
BODY_READ_MS: Final = 30_000  # a body that takes longer is an attack or a dead link (reliability C9)
BODY_FIELDS_MAX: Final = 128  # top-level names in one body; the dialect knows about 50
BODY_BESIDE_PROMPT_BYTES_MAX: Final = 64 << 10  # everything else in a body; decoding it costs Python objects
BODIES_HELD_BYTES_MAX: Final = 256 << 20  # bodies being read or checked, all together: the router's memory is finite
INLINE_CHARACTERS_MAX: Final = 4_096  # about 1 ms of encoding; longer prompts leave the event loop
ENCODES_WAITING_MAX: Final = 64  # long prompts queued for the one encoding thread; each holds its text
CONSTRAINT_CHECKS_WAITING_MAX: Final = 64  # constraints queued for the one thread that compiles them
LOGPROBS_PER_ANSWER_MAX: Final = 1 << 17  # numbers in one piece of JSON: so many hold the loop for 0.1 s, at worst 0.4
UNKNOWN_NAMES_MAX: Final = 256  # unknown field names remembered, so that each is logged once and none for ever
UNREAD_TOKENS_MAX: Final = 1_024  # more than any socket buffer explains: the client does not read
READ_GRACE_MS: Final = 30_000  # after the request's deadline, for the client to take what is buffered
METRIC_LABEL_VALUES_MAX: Final = 64  # series of one metric whose labels others choose; further ones count as "other"
METRIC_LABEL_CHARACTERS_MAX: Final = 64  # a longer value is cut: label values are held for the life of the process
