"""What FP8 costs in quality when a model is served: four studies, each JSON on disk and a table on screen.

    python -m fp8.bench.quality agreement  --model DIR --text FILE      greedy answers beside BF16's
    python -m fp8.bench.quality perplexity --model DIR --text FILE      by position, several caches
    python -m fp8.bench.quality needles    --text FILE --test FILE      a model taught here, needles found
    python -m fp8.bench.quality long-keys  --model DIR --text FILE      one step over 131,072 keys, exact references

    agreement.py    where greedy answers part
    perplexity.py   texts forced through a cache: the cost of keys and values in FP8, with paired intervals
    needles.py, teaching.py, retrieval.py    the task, the lessons, and what the engine finds
    long_keys.py    attention over very many keys: what codes cost, and what the kernel adds
    caches.py, forced.py, answers.py         the kinds of cache; teacher forcing; greedy answers of the engine
    command.py, tables.py                    the terminal's side

Everything goes through what serves: `fp8.serve`'s models, paged caches and engine, on a GPU by their kernels, on a CPU
by their references, where sizes must be small (`--windows`, `--prompts`, `--keys`, `--seconds`). Offsets and static
scales are calibrated on `--calibration`, another text than the one that is judged.
"""
