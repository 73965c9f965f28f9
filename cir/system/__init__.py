"""What every room needs of the machine: signals, text files and JSON read strictly, outputs written whole, numbers
checked.
"""
