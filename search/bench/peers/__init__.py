"""`prune-search bench peers`: this search beside other tools, in the same run.

The protocol, which is the same for every method:

- **Start.** The dense model of a seed is trained once (outside all budgets, cached) and every
  method loads these weights. Model, data, split, batch size and recovery are the config's.
- **Budget.** A method has `seconds` of wall clock from the moment its process is started, alone on
  the machine; the methods run one after the other, in an order that is rotated by the seed.
  Imports, Ray's start, scoring, block ranking and FastNAS's pre-search count; nothing of them is
  kept from one method or seed to the next. Whatever is not finished in time does not count.
- **Machine.** As many single-threaded workers for all as trials fit on the machine
  (cores / resources.cpu, at most resources.max_concurrent): `ours` on Ray, MOASHA in worker
  processes, the Torch-Pruning script as that many processes that deal the candidates out. FastNAS
  is one process by nature and has as many torch threads instead.
- **Candidate.** A pruned model counts from the moment when it had the whole recovery of the config
  (batch-norm recalibration, fine-tuning) and its validation accuracy is known. What a method stops
  earlier does not count. The dense model is everybody's candidate from the start.
- **Latency.** After the budgets one process measures the latency of every architecture that any
  method found, paired with the same dense model (`methods.measure.paired_latency`). What a search
  measures itself is its own affair and in its own time.
- **Score.** Hypervolume of (accuracy, latency) and (accuracy, MACs) of what was finished so far,
  at twenty points of time, against accuracy 0 and 1.1 x the dense model's cost, over 1.1 x that
  cost.

The methods:

- `ours`: `prunesearch.search.run`. Its caches are empty; only the dense weights are given.
- `torch-pruning`: what users of Torch-Pruning write: prune in one shot by L1 or Taylor, each
  layer alike (uniform) or by one threshold (global), all four in turn, at a ladder of ratios that
  spans the range early and gets finer until the time is over. Widths are multiples of
  `space.keep.round_to`.
- `fastnas`: NVIDIA ModelOpt's FastNAS, one search for each of a ladder of MACs constraints. Its
  sensitivity map is kept between the searches; channel divisor 4 (its default of 32 leaves small
  models nothing to choose).
- `moasha`: Syne Tune's MOASHA scheduler on our space flattened, with our trials; its trials report
  after batch-norm recalibration and at the end, and are stopped by its rule. Its `LocalBackend`
  starts a Python process a trial, which costs more than a trial here, so the scheduler is driven
  in a loop over lasting workers instead.
"""
