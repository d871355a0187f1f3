"""numpy's matrix products on the thread that asks for them.

OpenBLAS, which comes with numpy, hands products to a pool of its own threads, which then spin on whatever cores they
find: the engine's. In a worker, codec threads are the parallelism already. Products of torch are not concerned.
"""


def use_calling_thread() -> None:
    """From now on, in this process."""
    from threadpoolctl import ThreadpoolController

    ThreadpoolController().select(internal_api="openblas").limit(limits=1)
