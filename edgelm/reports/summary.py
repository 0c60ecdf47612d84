"""stub"""
def summary_page(inputs):
    return ""
