"""Evaluation: numbers that come with a floor and a metric card, a judge of classes, pictures, sample files.

`report.evaluate` computes all numbers. Nothing is imported here: figures and sample files are needed where
torch-fidelity and scikit-learn are not.
"""
