"""Search of a bit width for each layer and a layer width for each group of layers, under a hard budget.

sensitivity.py   how much each layer's weights matter: Hutchinson's trace, or the empirical Fisher
clusters.py      exact k-means of numbers
space.py         the choices of each layer, few where its sensitivity says so
widths.py        networks with more or fewer channels that compute (nearly) the same
cost.py          stored bytes, mean bits, multiplications and latency of a configuration
kmeans_tpe.py    the sampler, for Optuna; knows neither networks nor torch
baselines.py     uniform widths, greedy and exact allocation on the sensitivity
candidates.py    a configuration as a network: short training from one parent
storage.py       where studies live, and what is left of killed workers
trials.py        baselines in the queue, one trial after another
finals.py        which networks are trained to the end, and the best of them
study.py         `search_network`, the call that puts these together
"""
