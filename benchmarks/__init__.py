"""Speed relative to a reference in the same run: `python -m benchmarks` runs the rows that `__main__` lists.

timing    ways of doing the same work, in turn       steps     a training step, its parts, its views
row       a row's figures, ratios and targets        views     random views alone, and each operation
machine   the machine, its clock and its peak        stealing  an attack as of 2022 and as here
memory    peak memory                                probes    linear evaluation; a converged probe
report    the file of results and its table          start     seconds until the first step
peers     the same training by other software        growth    cost as the work grows
defences  what each defence adds to an answer        scaling   a step in several processes
"""
