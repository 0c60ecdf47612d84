"""Tuning: the best compression of a model for a device within a budget, found and proved.

space      what a configuration is, and which there are for a target
costs      what a configuration will cost: milliseconds and bytes, before it is made
quality    what it is worth: labelled data, or without labels
trial      a configuration made and judged; what a worker does
running    trials in processes of this machine, or on a Ray cluster
journal    every result on the disk at once, so that a run that was killed goes on
prediction final quality from a cheap look
pareto     which results no other beats
search     what to try next, and when to stop looking
tune       all of it: from a model to a bundle and a report
"""
