"""Models: which folder a name means (`resolve`), what the folder says (`info`), how it becomes a module (`checkpoint`),
and how that is made fast (`packing`). Nothing here is written for one family: modules are transformers'. One model that
sees is made here, from eyes that are packaged with it (`demo_vlm`)."""
