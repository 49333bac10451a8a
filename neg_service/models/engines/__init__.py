"""Engines: how the rows of a prompt are run. `base.py` says what an engine is, `select.py` chooses one for a model.

| engine                   | a row is                                          | for                               |
|--------------------------|---------------------------------------------------|-----------------------------------|
| `differences`            | its difference from the row without a shift       | shifts of single neurons, exactly |
| `shared_prefix`          | the last token over a prefix that all rows share  | causal attention, fast            |
| `kv_cache`               | the last token over a cache that each row repeats | attention of other kinds          |
| `recurrent_state`        | the last token, a step from a frozen state        | recurrent layers                  |
| `full_sequence`          | the whole prompt                                  | masked models, and the rest       |
| `full_sequence_unpadded` | the whole prompt, one prompt at a time            | masked models, if padding matters |

A new engine is a file with a subclass of `Engine`, and its place in `select.ENGINES`, among faster and slower ones.
"""
