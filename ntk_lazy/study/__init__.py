"""The study of one photograph: train the paper's network, track its spectrum, judge the claims, report.

Needs the extra ``ntk-lazy[study]``; ``ntk_lazy`` itself never imports this package.
"""
