"""Which experts a token goes to, and what their answers add up to. It knows no network.

Read view.py (what exists), router.py (the whole in one call), plan.py (dispatch and combine), then the parts a
router is made of: score.py, gate.py, selection.py, balance.py. presets.py names published combinations; metrics.py
measures use.

Shape suffixes here: T tokens, D model width, E experts of the layer (slots), K choices per token,
M pairs chosen, N pairs sent (N <= M), P rows of a product-key grid and its columns.
"""
