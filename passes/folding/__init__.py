"""Where a permutation can go: axes that share an order, what fixes it, the cheapest choice.

``analysis`` walks the graph by the rules of ``rules`` and writes down a ``Problem``; ``choice``
picks an order for every space of it; ``rewriting`` makes the graph compute in these orders.
"""
