"""(introduction to come)"""
