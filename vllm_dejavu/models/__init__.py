"""The served models: one file a family, of its norms, residuals, positions and names; what they share in
`base`.
"""
